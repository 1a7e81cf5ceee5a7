"""The packed-context diffusion transformer.

HunyuanVideo's double- and single-stream DiT, reading compressed history beside the noisy section.
Source: HunyuanVideo (arXiv 2412.03603) and FramePack (arXiv 2504.12626, section 3.2).

Sequence: [coarse context .. fine context][target][SigLIP tokens][text tokens]; masked text tokens
come last. RoPE rotates image tokens only.

Shapes: B batch, T latent frames, H W latent rows and columns, C channels, L tokens, D width.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from framepack_jax.models import lora_layers, scan
from framepack_jax.models.hunyuan.blocks import DoubleBlock, Head, RefinerBlock, SingleBlock
from framepack_jax.models.hunyuan.config import STACKS, TransformerConfig
from framepack_jax.models.hunyuan.embed import Conditions, EmbedConditions, EmbeddedConditions
from framepack_jax.models.packed_video import (
    EmbedVideo,
    cast_embedders,
    causal_frames,
    check_kernels,
    check_size,
    rope_tables,
    target_length,
)
from framepack_jax.models.params import Params
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.transformer_parts import divide_stream
from framepack_jax.ops.causal_frames import TargetFrames
from framepack_jax.ops.rope import Table, rope_table
from framepack_jax.packing import PackedContext


class Tokens(NamedTuple):
    """Input of the blocks: the streams `img` (B, L_img, D) and `txt` (B, L_txt, D), the modulation
    vector `vec` (B, D), RoPE tables of the image tokens, `valid` (B, L), and the number `masked`
    (B,) of the first image tokens that are not read, if any. `frames` is the place of the
    target, if no token reads a later frame of it."""

    img: jax.Array
    txt: jax.Array
    vec: jax.Array
    rope: Table
    valid: jax.Array
    masked: jax.Array | np.ndarray | None = None
    frames: TargetFrames | None = None


def velocity(
    cfg: TransformerConfig,
    params: Params,
    x: jax.Array,
    sigma: jax.Array,
    context: PackedContext,
    conditions: Conditions,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> jax.Array:
    """Predict the velocity, float32, of a noisy section x (B, T, H, W, C) at noise levels (B,).

    Blocks compute in `dtype`; `remat`, one of `scan.REMAT`, says what their gradient keeps. If
    blocks are offloaded, call it outside of `jax.jit`. Raises ValueError if H or W is odd, or if
    the network has no embedding for a kernel of the context.
    """
    tokens = embed(cfg, params, x, sigma, context, conditions, dtype)
    img = run_blocks(cfg, params, tokens, remat=remat)
    return head(cfg, params, img, tokens.vec, x.shape)


def embed(
    cfg: TransformerConfig,
    params: Params,
    x: jax.Array,
    sigma: jax.Array,
    context: PackedContext,
    conditions: Conditions,
    dtype: Any = jnp.float32,
) -> Tokens:
    """Patchify target and context, embed conditions, refine the text."""
    check_inputs(cfg, x, context, conditions)
    needed = {name: params[name] for name in ("embed", "refiner")}
    return jit_embed(cfg, dtype, needed, x, sigma, context, conditions)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def jit_embed(
    cfg: TransformerConfig,
    dtype: Any,
    params: Params,
    x: jax.Array,
    sigma: jax.Array,
    context: PackedContext,
    conditions: Conditions,
) -> Tokens:
    """Compute `embed` from the parameters "embed" and "refiner" as one program."""
    inputs = cast_params({"x": x, "context": context, "conditions": conditions}, dtype)
    embedders = cast_embedders(params["embed"], dtype)
    embed = functools.partial(lora_layers.apply, weights=dtype)
    img = embed(EmbedVideo(cfg), embedders, inputs["x"], inputs["context"])
    embedded: EmbeddedConditions = embed(
        EmbedConditions(cfg), embedders, sigma, inputs["conditions"], conditions.guidance
    )
    text = refine_text(cfg, params, embedded, conditions.text_valid)
    txt = jnp.concatenate([embedded.image, text], axis=1)
    unmasked = jnp.ones((x.shape[0], img.shape[1] + embedded.image.shape[1]), bool)
    valid = jnp.concatenate([unmasked, conditions.text_valid], axis=1)
    rope = rope_tables(cfg, x.shape, context)
    frames = causal_frames(cfg, x.shape, img.shape[1])
    img, txt = divide_stream(img), divide_stream(txt)
    return Tokens(img, txt, embedded.vec, rope, valid, context.masked, frames)


def refine_text(
    cfg: TransformerConfig, params: Params, embedded: EmbeddedConditions, valid: jax.Array
) -> jax.Array:
    """Run the text tokens (B, L, D) through the refiner blocks."""
    # A prompt without any token still needs one to attend to.
    readable = jnp.asarray(valid).at[:, 0].set(True)
    refiner = RefinerBlock(cfg)
    return scan.run(refiner, params["refiner"], embedded.text, embedded.text_vec, readable)


def run_blocks(
    cfg: TransformerConfig, params: Params, tokens: Tokens, first: int = 0, remat: str = "none"
) -> jax.Array:
    """Return the image tokens (B, L_img, D) after the double blocks from `first` on and all single
    blocks."""
    inputs = tokens[2:]
    layers = slice(first, None) if first else slice(None)
    img, txt = scan.run(
        DoubleBlock(cfg), params["double"], (tokens.img, tokens.txt), *inputs,
        layers=layers, remat=remat,
    )  # fmt: skip
    joined = jit_join(img, txt)
    joined = scan.run(SingleBlock(cfg), params["single"], joined, *inputs, remat=remat)
    return joined[:, : img.shape[1]]


@jax.jit
def jit_join(img: jax.Array, txt: jax.Array) -> jax.Array:
    """Join the image and text streams (B, L, D) as one."""
    return divide_stream(jnp.concatenate([img, txt], axis=1))


def head(
    cfg: TransformerConfig,
    params: Params,
    img: jax.Array,
    vec: jax.Array,
    shape: tuple[int, ...],
) -> jax.Array:
    """Return the velocity (B, T, H, W, C), float32, of the target, whose tokens are the last of
    `img`."""
    return jit_head(cfg, shape, params["head"], img, vec)


@functools.partial(jax.jit, static_argnames=("cfg", "shape"))
def jit_head(
    cfg: TransformerConfig, shape: tuple[int, ...], params: Params, img: jax.Array, vec: jax.Array
) -> jax.Array:
    """Compute `head` from the parameters "head" as one program."""
    _, t, h, w, _ = shape
    out = lora_layers.apply(Head(cfg), params, img[:, -target_length(shape) :], vec)
    return rearrange(
        out, "b (t h w) (c ph pw) -> b t (h ph) (w pw) c", t=t, h=h // 2, w=w // 2, ph=2, pw=2
    )


def check_inputs(
    cfg: TransformerConfig, x: jax.Array, context: PackedContext, conditions: Conditions
) -> None:
    """Raise ValueError if the network cannot read these inputs."""
    for name, needed in (("guidance", cfg.guidance), ("image", cfg.image_dim is not None)):
        if needed and getattr(conditions, name) is None:
            raise ValueError(f"conditions have no {name}, which this network was made to read")
    check_size(x.shape)
    check_kernels(cfg, context.kernels)


def encoders(cfg: TransformerConfig) -> tuple[str, ...]:
    """Return the roles of the encoders that the network reads."""
    of_image = () if cfg.image_dim is None else ("image_encoder",)
    return "text_encoder", "text_encoder_2", *of_image


def init(cfg: TransformerConfig, key: jax.Array) -> Params:
    """Draw random parameters, layers stacked."""
    keys = dict(zip(("embed", "head", *STACKS), jax.random.split(key, 5), strict=True))
    kernels = cfg.context_kernels
    x = jnp.zeros((1, 1, 2, 2, cfg.in_channels))
    index = jnp.zeros((1, 1), jnp.int32)
    context = PackedContext((x,) * len(kernels), (index,) * len(kernels), index, kernels)
    image = None if cfg.image_dim is None else jnp.zeros((1, 1, cfg.image_dim))
    text, pooled = jnp.zeros((1, 2, cfg.text_dim)), jnp.zeros((1, cfg.pooled_dim))
    one, valid = jnp.ones(1), jnp.ones((1, 2), bool)
    conditions = Conditions(text, valid, pooled, image, one)
    tokens, vec = jnp.zeros((1, 1, cfg.width)), jnp.zeros((1, cfg.width))
    rope = rope_table(index, 1, 1, cfg.rope_axes, cfg.rope_theta)

    def layers(name: str, block: nn.Module, *args: Any) -> Params:
        return scan.init(block, keys[name], getattr(cfg, STACKS[name]), *args)

    video = EmbedVideo(cfg).init(keys["embed"], x, context)["params"]
    embedders = EmbedConditions(cfg).init(keys["embed"], one, conditions, one)["params"]
    return {
        "embed": {**video, **embedders},
        "refiner": layers("refiner", RefinerBlock(cfg), tokens, vec, valid[:, :1]),
        "double": layers("double", DoubleBlock(cfg), (tokens, tokens), vec, rope, valid),
        "single": layers("single", SingleBlock(cfg), tokens, vec, rope, valid[:, :1]),
        "head": Head(cfg).init(keys["head"], tokens, vec)["params"],
    }
