"""Parts of the transformer that a step cache calls besides the forward pass."""

import functools

import jax

from framepack_jax.diffusion.network import StepCacheHooks
from framepack_jax.models import lora_layers, scan
from framepack_jax.models.hunyuan.blocks import BlockInput, DoubleBlock
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.transformer import Tokens, embed, head, run_blocks
from framepack_jax.models.params import Params
from framepack_jax.models.quantization import cast_params

# Change of the blocks' output as a polynomial of their input's relative change, highest power
# first: TeaCache's fit to HunyuanVideo, from the FramePack release.
TEACACHE = (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)


def block_input(cfg: TransformerConfig, params: Params, tokens: Tokens) -> jax.Array:
    """Return the modulated norm (B, L_img, D) of the image tokens that the first double block
    projects."""
    modulation = scan.get_layer(params["double"], 0, parts=["img_mod"])
    return _block_input(cfg, modulation, tokens.img, tokens.vec)


@functools.partial(jax.jit, static_argnames="cfg")
def _block_input(
    cfg: TransformerConfig, modulation: Params, img: jax.Array, vec: jax.Array
) -> jax.Array:
    return lora_layers.apply(BlockInput(cfg), cast_params(modulation, img.dtype), img, vec)


def first_block(cfg: TransformerConfig, params: Params, tokens: Tokens) -> Tokens:
    """Return the tokens after the first double block."""
    img, txt, *inputs = tokens
    img, txt = scan.run(DoubleBlock(cfg), params["double"], (img, txt), *inputs, layers=slice(0, 1))
    return tokens._replace(img=img, txt=txt)


HOOKS = StepCacheHooks(
    embed=embed,
    block_input=block_input,
    first_block=first_block,
    run_blocks=run_blocks,
    head=head,
    teacache=TEACACHE,
)
