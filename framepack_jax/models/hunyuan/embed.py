"""Embeddings of the conditions: prompt, image, guidance and time.

Shapes: B batch, L tokens, D width.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.transformer_parts import sinusoid


@struct.dataclass
class Conditions:
    """Conditions of a video: text, image and guidance.

    `text` (B, L, text_dim) are prompt states; `text_valid` (B, L) is True for valid tokens, a
    prefix. `pooled` (B, pooled_dim) is the prompt's one vector, `image` (B, L, image_dim) are image
    tokens or None, and `guidance` (B,) is the scale of distilled guidance or None.
    """

    text: jax.Array
    text_valid: jax.Array
    pooled: jax.Array
    image: jax.Array | None = None
    guidance: jax.Array | None = None


class EmbeddedConditions(NamedTuple):
    """Image tokens (B, L, D), text tokens (B, L, D) and the vectors (B, D) that modulate the blocks
    and gate the refiner."""

    image: jax.Array
    text: jax.Array
    vec: jax.Array
    text_vec: jax.Array


class EmbedConditions(nn.Module):
    """Embed time, guidance, prompt and image."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self, sigma: jax.Array, conditions: Conditions, guidance: jax.Array | None
    ) -> EmbeddedConditions:
        cfg, dtype = self.cfg, conditions.text.dtype
        time = sinusoid(1000 * sigma).astype(dtype)
        vec = self.mlp("time", time)
        if cfg.guidance:
            assert guidance is not None  # `transformer.check_inputs`
            vec += self.mlp("guidance", sinusoid(1000 * guidance).astype(dtype))
        vec += self.mlp("pooled", conditions.pooled)

        mean = _masked_mean(conditions.text, conditions.text_valid)
        text_vec = self.mlp("text_time", time)
        text_vec += self.mlp("text_pooled", mean)
        text = nn.Dense(cfg.width, name="text_proj")(conditions.text)

        image = jnp.zeros((sigma.shape[0], 0, cfg.width), dtype)
        if cfg.image_dim is not None:
            image = nn.silu(nn.Dense(3 * cfg.width, name="image_up")(conditions.image))
            image = nn.Dense(cfg.width, name="image_down")(image)
        return EmbeddedConditions(image, text, vec, text_vec)

    def mlp(self, name: str, x: jax.Array) -> jax.Array:
        hidden = nn.silu(nn.Dense(self.cfg.width, name=f"{name}_in")(x))
        return nn.Dense(self.cfg.width, name=f"{name}_out")(hidden)


def _masked_mean(text: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over valid tokens, summed in float32: (B, L, D), (B, L) -> (B, D)."""
    weights = valid.astype(jnp.float32)[:, :, None]
    total = jnp.sum(text.astype(jnp.float32) * weights, axis=1)
    return (total / jnp.maximum(jnp.sum(weights, axis=1), 1)).astype(text.dtype)
