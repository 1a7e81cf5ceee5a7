"""Flow matching along straight paths, and the noise levels a sampler visits.

A sample x and noise are joined by x_t = (1 - sigma) x + sigma noise; the network predicts the
velocity d x_t / d sigma = noise - x. Larger canvases need more steps at high noise, so sigmas are
shifted by the number of tokens of the section that is generated (Esser et al., arXiv 2403.03206;
constants and cap are those of the released FramePack sampler).

Shapes: B batch; x and noise are (B, ...); sigma is a scalar or (B,).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MIN_TOKENS, MIN_TOKENS_MU = 256, 0.5
MAX_TOKENS, MAX_TOKENS_MU = 4096, 1.15
MAX_MU = math.log(7.0)


def linear_mu(tokens: int) -> float:
    """Return the shift for a section of `tokens` tokens, linear in them."""
    slope = (MAX_TOKENS_MU - MIN_TOKENS_MU) / (MAX_TOKENS - MIN_TOKENS)
    return MIN_TOKENS_MU + slope * (tokens - MIN_TOKENS)


def shift_mu(tokens: int) -> float:
    """Return the shift for a section of `tokens` tokens: linear in them, at most ln 7."""
    return min(linear_mu(tokens), MAX_MU)


def sigmas(steps: int, mu: float) -> np.ndarray:
    """Return noise levels (steps + 1,) float64 from 1 down to 0, even in t and shifted by mu.

    sigma = e^mu / (e^mu + 1/t - 1), multiplied by t so that t = 0 needs no special case.
    Raises ValueError if there is no step.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; a sampler needs at least 1")
    return shift(np.linspace(1.0, 0.0, steps + 1), mu)


def shift(t: Any, mu: float) -> Any:
    """Shift times t in [0, 1], numpy or JAX, to noise levels: e^mu t / (e^mu t + 1 - t)."""
    return math.exp(mu) * t / (math.exp(mu) * t + 1.0 - t)


def interpolate(x: jax.Array, noise: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """Return x_t = (1 - sigma) x + sigma noise, float32."""
    x, noise = x.astype(jnp.float32), noise.astype(jnp.float32)
    sigma = _over(x, sigma)
    return (1.0 - sigma) * x + sigma * noise


def velocity_target(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Return the training target of the network at every x_t: noise - x, float32."""
    return noise.astype(jnp.float32) - x.astype(jnp.float32)


def x0_from_velocity(
    x: jax.Array, velocity: jax.Array, sigma: jax.Array | np.ndarray | np.floating | float
) -> jax.Array:
    """Return the sample that a velocity at x = x_t points to, x - sigma velocity, float32."""
    x, velocity = x.astype(jnp.float32), velocity.astype(jnp.float32)
    return x - _over(x, sigma) * velocity


def _over(x: jax.Array, sigma: jax.Array | np.ndarray | np.floating | float) -> jax.Array:
    """Return sigma, a scalar or (B,), with as many axes as x."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
