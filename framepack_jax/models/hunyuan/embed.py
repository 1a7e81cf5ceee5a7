"""Embeddings of the packed-context transformer: latents, prompt, image, time and positions.

Shapes: B batch, T latent frames, H W latent rows and columns, C channels, L tokens, D width.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import struct

from framepack_jax.models.hunyuan.config import (
    PATCH,
    POOLED_KERNELS,
    TransformerConfig,
    embedding_kernel,
)
from framepack_jax.ops.rope import Table, rope_table
from framepack_jax.packing import PackedContext, kernel_shape


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


class EmbedVideo(nn.Module):
    """Patchify context groups and target: (B, L, D), the target's tokens last."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: PackedContext) -> jax.Array:
        cfg = self.cfg
        embedders = {k: ContextEmbed(cfg, name=f"context_{k}") for k in cfg.context_kernels}
        groups = [
            embedders[embedding_kernel(kernel)](latents, kernel)
            for latents, kernel in zip(context.latents, context.kernels, strict=True)
        ]
        target = nn.Dense(cfg.width, name="patch")(_patches(x, PATCH))
        return jnp.concatenate([*groups, target], axis=1)


class ContextEmbed(nn.Module):
    """Patch embedding of context latents (B, F, H, W, C) by one kernel; ragged edges are padded."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, latents: jax.Array | np.ndarray, kernel: str) -> jax.Array:
        if kernel in POOLED_KERNELS:
            latents = reduce(
                _pad(latents, (2, 2, 2)),
                "b (t pt) (h ph) (w pw) c -> b t h w c", "mean", pt=2, ph=2, pw=2,
            )  # fmt: skip
            kernel = POOLED_KERNELS[kernel]
        width, size = self.cfg.width, math.prod(kernel_shape(kernel)) * self.cfg.in_channels
        weights = self.param("kernel", nn.initializers.lecun_normal(), (size, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        return _patches(latents, kernel) @ weights + bias[None, None, :]


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


def rope_tables(cfg: TransformerConfig, shape: tuple[int, ...], context: PackedContext) -> Table:
    """RoPE tables of all image tokens, of a target (B, T, H, W, C) of this shape and its context.

    The table of a context token is the mean over the positions that its kernel covers.
    """
    rows, columns = shape[2] // 2, shape[3] // 2
    tables = []
    for indices, kernel in zip(context.indices, context.kernels, strict=True):
        kt, kh, kw = kernel_shape(kernel)
        pool = (kt, kh // 2, kw // 2)
        tables.append(rope_table(indices, rows, columns, cfg.rope_axes, cfg.rope_theta, pool))
    target = context.target_indices
    tables.append(rope_table(target, rows, columns, cfg.rope_axes, cfg.rope_theta))
    cos, sin = (jnp.concatenate(parts, axis=1) for parts in zip(*tables, strict=True))
    return cos, sin


def sinusoid(t: jax.Array, width: int = 256) -> jax.Array:
    """(B,) -> (B, width) float32: cosines then sines, periods from 2 pi to 2 pi * 10^4."""
    frequencies = np.exp(-np.log(10000.0) * np.arange(width // 2) / (width // 2))
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _patches(x: jax.Array | np.ndarray, kernel: str) -> jax.Array:
    """(B, T, H, W, C) -> (B, L, kt * kh * kw * C), padded to the kernel by replication."""
    kt, kh, kw = kernel_shape(kernel)
    return rearrange(
        _pad(x, (kt, kh, kw)),
        "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=kt, ph=kh, pw=kw,
    )  # fmt: skip


def _pad(x: jax.Array | np.ndarray, multiple: tuple[int, int, int]) -> jax.Array:
    ragged = [(0, -n % k) for n, k in zip(x.shape[1:4], multiple, strict=True)]
    return jnp.pad(x, [(0, 0), *ragged, (0, 0)], mode="edge")


def _masked_mean(text: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over valid tokens, summed in float32: (B, L, D), (B, L) -> (B, D)."""
    weights = valid.astype(jnp.float32)[:, :, None]
    total = jnp.sum(text.astype(jnp.float32) * weights, axis=1)
    return (total / jnp.maximum(jnp.sum(weights, axis=1), 1)).astype(text.dtype)
