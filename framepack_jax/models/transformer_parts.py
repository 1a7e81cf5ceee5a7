"""Parts that the transformers of all families share.

Modulation and residual sums are computed in float32. Shapes: B batch, L tokens, N heads, D width =
N heads x head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from framepack_jax.ops.attention import to_tokens
from framepack_jax.parallel.sharding import BATCH, TOKENS, constrain


def sinusoid(t: jax.Array, width: int = 256) -> jax.Array:
    """(B,) -> (B, width) float32: cosines then sines, periods from 2 pi to 2 pi * 10^4."""
    frequencies = np.exp(-np.log(10000.0) * np.arange(width // 2) / (width // 2))
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def merge_heads(attention: jax.Array) -> jax.Array:
    """(B, L, N, head_dim) -> (B, L, D); inverts the all-to-all of `to_heads`."""
    attention = to_tokens(attention)
    return divide_columns(rearrange(attention, "b l n d -> b l (n d)"))


def divide_stream(x: jax.Array) -> jax.Array:
    """Divide the batch and tokens of a stream (B, L, D) over the mesh."""
    return constrain(x, BATCH, TOKENS, None)


def divide_columns(x: jax.Array) -> jax.Array:
    """Divide the activations (B, L, columns) between two paired projections over the mesh, like a
    stream and by columns."""
    return constrain(x, BATCH, TOKENS, "tensor")


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float = 1e-6) -> jax.Array:
    """norm(x) (1 + scale) + shift, in float32, as x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps) * (1 + scale) + shift).astype(x.dtype)


def gated(x: jax.Array, gate: jax.Array, branch: jax.Array) -> jax.Array:
    """x + gate * branch, in float32, as x's dtype."""
    total = x.astype(jnp.float32) + gate * branch.astype(jnp.float32)
    return divide_stream(total.astype(x.dtype))
