"""Losses of a VAE: the error of its reconstructions, and a divergence.

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from framepack_jax.models.autoencoder import sample_posterior
from framepack_jax.models.network_spec import VaeSpec
from framepack_jax.models.params import Params
from framepack_jax.models.tiling import Tiling
from framepack_jax.training.vae_config import VaeTrainConfig

EDGE = 0.15
"""Minimum difference between neighbouring pixels in [-1, 1] at an edge."""
NEAR = 3
"""Maximum distance in pixels of what counts as near an edge."""
ADDED = 1
"""Number of the key of the noise on latents; the posterior is sampled with the key itself."""
WHOLE = Tiling(frames=None)


class Losses(NamedTuple):
    """Scalars of a batch: error as the configuration weighs it, mean squared error, and KL
    divergence of a latent number from a normal distribution."""

    error: jax.Array
    squared: jax.Array
    kl: jax.Array


def losses(
    spec: VaeSpec, network: Any, cfg: VaeTrainConfig, params: Params, clips: jax.Array,
    key: jax.Array,
) -> Losses:  # fmt: skip
    """Compare clips (B, T, H, W, C) in [-1, 1] with what a sample of their latents decodes to."""
    mean, logvar = spec.encode(network, params, clips, WHOLE)
    latents = sample_posterior(mean, logvar, jax.random.normal(key, mean.shape))
    if cfg.latent_noise:
        added = jax.random.normal(jax.random.fold_in(key, ADDED), mean.shape)
        latents += cfg.latent_noise * added
    decoded = spec.decode(network, params, latents, WHOLE)
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
    return Losses(error_of(cfg, decoded, clips), jnp.mean(jnp.square(decoded - clips)), kl)


def error_of(cfg: VaeTrainConfig, decoded: jax.Array, clips: jax.Array) -> jax.Array:
    """Return the error of decoded clips (B, T, H, W, C): the mean over pixels, those near edges
    with `cfg.edge_weight`, plus that of differences between neighbours."""
    of_pixel = jnp.square if cfg.error == "squared" else jnp.abs
    errors = of_pixel(decoded - clips)
    if cfg.edge_weight == 1:
        error = jnp.mean(errors)
    else:
        weights = 1 + (cfg.edge_weight - 1) * near_edges(clips)
        error = jnp.mean(weights * errors) / jnp.mean(weights)
    if cfg.gradient_error:
        wrong = [jnp.diff(decoded, axis=axis) - jnp.diff(clips, axis=axis) for axis in (2, 3)]
        error += cfg.gradient_error * sum(jnp.mean(jnp.abs(each)) for each in wrong)
    return error


def near_edges(clips: jax.Array) -> jax.Array:
    """Return 1 for pixels of clips (B, T, H, W, C) at most NEAR rows and columns from an edge, else
    0: (B, T, H, W, 1)."""
    edges = jnp.zeros(clips.shape[:-1])
    for axis in (2, 3):
        jump = jnp.max(jnp.abs(jnp.diff(clips, axis=axis)), axis=-1) >= EDGE
        for sides in ((1, 0), (0, 1)):
            both = [(0, 0)] * 4
            both[axis] = sides
            edges = jnp.maximum(edges, jnp.pad(jump.astype(edges.dtype), both))
    # An edge lies between two pixels, and both are marked.
    window = 1, 1, 2 * NEAR - 1, 2 * NEAR - 1
    near = jax.lax.reduce_window(edges, 0.0, jax.lax.max, window, (1,) * 4, "SAME")
    return near[..., None]
