"""SigLIP's vision model: an image as a grid of tokens, without the pooling head.

Source: SigLIP (arXiv 2303.15343), as in Hugging Face transformers' SiglipVisionModel. The defaults
are those of so400m/14-384: 27 x 27 tokens.

Shapes: B batch, H W rows and columns of pixels, C channels, L tokens in row-major order, D width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from framepack_jax.models import scan
from framepack_jax.models.encoders.block import EncoderBlock, layer_norm
from framepack_jax.models.network_spec import NetworkSpec
from framepack_jax.models.params import Params, apply_module
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.sizes import Layers, Positive, Size

STACKS = {"layers": "layers"}
# Megatron's pairs, with `fsdp` on the remaining dimension.
SHARDINGS = (
    (r"patch/kernel", (None, "fsdp")),
    (r"patch/bias", ()),
    (r"position_embedding/embedding", ()),
    (r"layers/qkv/kernel", (None, "fsdp", None, "tensor", None)),
    (r"layers/qkv/bias", (None, None, "tensor", None)),
    (r"layers/mlp_in/kernel", (None, "fsdp", "tensor")),
    (r"layers/mlp_in/bias", (None, "tensor")),
    (r"layers/(out|mlp_out)/kernel", (None, "tensor", "fsdp")),
    (r"layers/(out|mlp_out)/bias", ()),
    (r"(layers/norm\d|final_norm)/(scale|bias)", ()),
)


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the network; `image_size` and `patch_size` in pixels, `activation` a key of
    `block.ACTIVATIONS`."""

    width: Size = 1152
    layers: Layers = 27
    heads: Size = 16
    mlp_width: Size = 4304
    image_size: Size = 384
    patch_size: Size = 14
    channels: Size = 3
    norm_eps: Positive = 1e-6
    activation: str = "gelu_tanh"

    @property
    def grid(self) -> int:
        """Return the patches a side; pixels beyond the last whole patch are not read."""
        return self.image_size // self.patch_size


def hidden_states(cfg: SiglipConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """Encode normalised pixels (B, H, W, C) to states (B, L, D) after the final norm.

    States have the pixels' dtype. Raises ValueError if the image is not of the config's size.
    """
    expected = (cfg.image_size, cfg.image_size, cfg.channels)
    if pixels.shape[1:] != expected:
        raise ValueError(f"image encoder: pixels {pixels.shape[1:]}, expected {expected}")
    whole = cfg.grid * cfg.patch_size
    patches = rearrange(
        pixels[:, :whole, :whole],
        "b (h ph) (w pw) c -> b (h w) (ph pw c)", ph=cfg.patch_size, pw=cfg.patch_size,
    )  # fmt: skip
    outer = cast_params({k: v for k, v in params.items() if k not in STACKS}, pixels.dtype)
    x = apply_module(nn.Dense(cfg.width), outer["patch"], patches)
    x += outer["position_embedding"]["embedding"][None, :, :]
    x = scan.run(EncoderBlock(cfg), params["layers"], x, False)
    return apply_module(layer_norm(cfg), outer["final_norm"], x)


def init(cfg: SiglipConfig, key: jax.Array) -> Params:
    """Draw random parameters, layers stacked."""
    patch, position, layers, norm = jax.random.split(key, 4)
    pixels = jnp.zeros((1, 1, cfg.patch_size**2 * cfg.channels))
    index, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, cfg.width))
    return {
        "patch": nn.Dense(cfg.width).init(patch, pixels)["params"],
        "position_embedding": nn.Embed(cfg.grid**2, cfg.width).init(position, index)["params"],
        "layers": scan.init(EncoderBlock(cfg), layers, cfg.layers, x, False),
        "final_norm": layer_norm(cfg).init(norm, x)["params"],
    }


SPEC = NetworkSpec(
    kind="siglip_vision",
    config=SiglipConfig,
    init=init,
    sharding_rules=SHARDINGS,
    stacks=STACKS,
)
