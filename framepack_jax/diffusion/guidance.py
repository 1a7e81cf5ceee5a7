"""Classifier-free guidance on the velocity (Ho and Salimans, arXiv 2207.12598), with rescale.

History guidance leaves the history out of the second pass instead of the prompt (Song et al., arXiv
2502.06764): v = v_without + scale (v - v_without).

A high scale also raises the contrast of the result; rescaling to the standard deviation of the
positive prediction takes that back (Lin et al., arXiv 2305.08891, section 3.4).

Shapes: B batch; predictions are (B, ...).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from framepack_jax.diffusion import flow
from framepack_jax.diffusion.network import Array, Denoiser, Pass, Prediction


def guide(
    positive: jax.Array, negative: jax.Array, scale: Array | float, rescale: Array | float
) -> jax.Array:
    """Return negative + scale (positive - negative), float32, rescaled to positive's deviation.

    `rescale` from 0 (leave it) to 1 (equal to positive's) blends; deviations are taken per sample
    over all axes but the first. scale = 1 returns positive.
    """
    positive, negative = positive.astype(jnp.float32), negative.astype(jnp.float32)
    guided = negative + scale * (positive - negative)
    axes = tuple(range(1, positive.ndim))
    ratio = positive.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
    return guided * (1.0 + rescale * (ratio - 1.0))


def project(positive: jax.Array, negative: jax.Array) -> jax.Array:
    """Return the part of `positive` along `negative`, float32, over all axes but the first: the
    negative prediction of CFG-Zero* (Fan et al., arXiv 2503.18886, section 4.1)."""
    positive, negative = positive.astype(jnp.float32), negative.astype(jnp.float32)
    axes = tuple(range(1, positive.ndim))
    along = jnp.sum(positive * negative, axes, keepdims=True)
    return negative * (along / (jnp.sum(negative**2, axes, keepdims=True) + 1e-8))


def guided(
    run: Pass,
    inputs: Sequence[tuple[Any, Any]],
    scale: Array | float,
    rescale: Array | float,
    time: Array | None = None,
    still: Array | None = None,
) -> Denoiser:
    """Run a pass for each of the `inputs` (context, conditions), the negative one last, and combine
    the velocities.

    The memory has an entry for each pass, and so has `blocks_run` (passes, B). One pass needs no
    guidance. `time` is the noise level that the network is told, if it is not sigma. If `still` is
    given, guidance is CFG-Zero*, and where it is true the velocity is zero.
    """

    def denoise(x: jax.Array, sigma: Array, memory: Any) -> Prediction:
        told = sigma if time is None else time
        done = [run(x, told, *each, kept) for each, kept in zip(inputs, memory, strict=True)]
        velocities, memory, ran = zip(*done, strict=True)
        x0 = _x0(x, sigma, velocities, scale, rescale, still)
        return Prediction(x0, memory, None if ran[0] is None else jnp.stack(ran))

    return denoise


@jax.jit
def _x0(
    x: jax.Array,
    sigma: Array,
    velocities: Sequence[jax.Array],
    scale: Array | float,
    rescale: Array | float,
    still: Array | None,
) -> jax.Array:
    velocity, *negatives = velocities
    if negatives:
        [negative] = negatives
        negative = negative if still is None else project(velocity, negative)
        velocity = guide(velocity, negative, scale, rescale)
        velocity = velocity if still is None else jnp.where(still, 0, velocity)
    return flow.x0_from_velocity(x, velocity, sigma)
