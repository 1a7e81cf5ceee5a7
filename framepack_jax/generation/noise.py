"""Draw the noise of sections from seeds.

Shapes: B batch, w latent window, H W latent rows and columns, C channels.
"""

from collections.abc import Sequence

import jax
import numpy as np

from framepack_jax.diffusion import pyramid
from framepack_jax.diffusion.recipe import Recipe


def draw(
    recipe: Recipe, seeds: Sequence[int], section: int, shape: tuple[int, ...]
) -> list[np.ndarray]:
    """Draw the noise of a section of latents `shape` (w, H, W, C), for a sample of each seed.

    Returns noise (B, w, H, W, C) for its start and, by a recipe with stages, block noise for the
    start of each further stage. Section i draws from fold_in(seed, i).
    """
    window, rows, columns, channels = shape
    draws = [np.stack([_normal(seed, section, shape) for seed in seeds])]
    for stage in range(1, recipe.stages):
        part = 2 ** (recipe.stages - 1 - stage)
        size = window, rows // part, columns // part, channels
        noise = np.stack([_normal(seed, section, size, stage) for seed in seeds])
        draws.append(pyramid.block_noise(noise, recipe.gamma))
    return draws


def _normal(seed: int, section: int, shape: tuple[int, ...], stage: int = 0) -> jax.Array:
    key = jax.random.fold_in(key_of(seed), section)
    return jax.random.normal(jax.random.fold_in(key, stage) if stage else key, shape)


def key_of(seed: int) -> jax.Array:
    """Return the key of a seed of up to 64 bits; for one of 32 bits it is jax.random.key(seed)."""
    high, low = divmod(seed, 2**32)
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key
