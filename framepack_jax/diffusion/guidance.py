"""Classifier-free guidance on the velocity (Ho and Salimans, arXiv 2207.12598), with rescale.

A high scale also raises the contrast of the result; rescaling to the standard deviation of the
positive prediction takes that back (Lin et al., arXiv 2305.08891, section 3.4).

Shapes: B batch; predictions are (B, ...).
"""

import jax
import jax.numpy as jnp


def guide(
    positive: jax.Array, negative: jax.Array, scale: jax.Array | float, rescale: jax.Array | float
) -> jax.Array:
    """negative + scale (positive - negative), float32, its deviation pulled towards positive's.

    `rescale` from 0 (leave it) to 1 (equal to positive's) blends; deviations are taken per sample
    over all axes but the first. scale = 1 returns positive.
    """
    positive, negative = positive.astype(jnp.float32), negative.astype(jnp.float32)
    guided = negative + scale * (positive - negative)
    axes = tuple(range(1, positive.ndim))
    ratio = positive.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
    return guided * (1.0 + rescale * (ratio - 1.0))
