"""Noise the history that the network reads, to a factor of the noise level of its target.

Source: FramePack (arXiv 2504.12626, table 2), after Diffusion Forcing (arXiv 2407.01392): the
timestep of history frames is a multiple of the target's, with one factor in training and another
in sampling. Ours: anchor and start image stay clean, and all steps of a section share one noise.

Shapes: B batch, F frames of a context group, h W latent rows and columns, C channels.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from framepack_jax.diffusion import flow
from framepack_jax.diffusion.network import Array


class HistoryNoise(NamedTuple):
    """Noise of the history of a section.

    `factor` times the noise level of the target is that of the history. By context group, `noise`
    (B, F, h, W, C) has normal numbers, and `history` (1, F) or (B, F) is True for frames to noise.
    """

    factor: Array
    noise: tuple[Any, ...]
    history: tuple[Array, ...]


def noised(latents: jax.Array, noise: jax.Array, levels: jax.Array, chosen: Array) -> jax.Array:
    """Noise latents (B, F, h, W, C) to levels (B, F) where `chosen` (1, F) or (B, F) is True.
    Missing frames, which are zero, stay zero."""
    present = jnp.any(latents != 0, axis=(2, 3, 4))
    made = jax.vmap(flow.interpolate)(latents, noise, levels)
    changes = (jnp.asarray(chosen) & present)[:, :, None, None, None]
    return jnp.where(changes, made, latents).astype(latents.dtype)


@jax.jit
def noise_history(context: Any, noise: HistoryNoise, sigma: Array) -> Any:
    """Return a packed context whose history has the noise of a step at level `sigma`, a scalar or
    (B,)."""
    groups = zip(context.latents, noise.noise, noise.history, strict=True)
    latents = []
    for frames, normal, history in groups:
        level = jnp.asarray(noise.factor * sigma).reshape(-1, 1)
        latents.append(noised(frames, normal, jnp.broadcast_to(level, frames.shape[:2]), history))
    return dataclasses.replace(context, latents=tuple(latents))
