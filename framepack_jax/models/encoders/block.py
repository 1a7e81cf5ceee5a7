"""The pre-norm transformer block of CLIP's text model and SigLIP's vision model.

Source: CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343), as in Hugging Face transformers.

Shapes: B batch, L tokens, N heads, D width = N heads x head width.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from einops import rearrange

from framepack_jax.ops.attention import attend

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


class EncoderBlock(nn.Module):
    """Self-attention, then a two-layer MLP, each added to the stream: (B, L, D) -> (B, L, D).

    `cfg` is a `clip.ClipConfig` or a `siglip.SiglipConfig`.
    """

    cfg: Any

    @nn.compact
    def __call__(self, x: jax.Array, causal: bool) -> jax.Array:
        cfg = self.cfg
        normed = layer_norm(cfg, "norm1")(x)
        qkv = nn.DenseGeneral((3, cfg.heads, cfg.width // cfg.heads), name="qkv")(normed)
        attention = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], causal=causal)
        x += nn.Dense(cfg.width, name="out")(rearrange(attention, "b l n d -> b l (n d)"))
        hidden = nn.Dense(cfg.mlp_width, name="mlp_in")(layer_norm(cfg, "norm2")(x))
        return x + nn.Dense(cfg.width, name="mlp_out")(ACTIVATIONS[cfg.activation](hidden))


def layer_norm(cfg: Any, name: str | None = None) -> nn.LayerNorm:
    """Return the layer norm of these networks."""
    return nn.LayerNorm(cfg.norm_eps, use_fast_variance=False, name=name)
