"""Draw the noise of sections, and that of their history, from seeds.

Shapes: B batch, w latent window, H W latent rows and columns, C channels.
"""

from collections.abc import Sequence

import jax
import numpy as np

from framepack_jax.diffusion import pyramid
from framepack_jax.diffusion.history_noise import HistoryNoise
from framepack_jax.diffusion.recipe import Recipe
from framepack_jax.packing import PackedContext, Schedule, Section, given_frames, history_ages

# Number that is folded into the key of a section for the noise of its history; stages have smaller
# ones.
HISTORY = 2**31 - 2


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


def draw_history(
    schedule: Schedule,
    sections: Sequence[Section],
    context: PackedContext,
    start: int,
    factor: float,
    seeds: Sequence[int],
    number: int,
) -> HistoryNoise | None:
    """Draw the noise of the history of section `number`, for a sample of each seed; None if
    `factor` is 0. The first `start` latent frames and the anchor have none.

    `sections` is the section as each sample reads it, or as all do."""
    if not factor:
        return None
    given = (
        np.stack(each) for each in zip(*(given_frames(s, start) for s in sections), strict=True)
    )
    ages = (np.asarray(group)[None] >= 0 for group in history_ages(schedule))
    history = tuple(age & ~mask for age, mask in zip(ages, given, strict=True))
    keys = [jax.random.fold_in(jax.random.fold_in(key_of(s), number), HISTORY) for s in seeds]

    def normal(group: int, shape: tuple[int, ...]) -> np.ndarray:
        draws = (jax.random.normal(jax.random.fold_in(key, group), shape) for key in keys)
        return np.stack(list(draws))

    noise = (normal(group, frames.shape[1:]) for group, frames in enumerate(context.latents))
    return HistoryNoise(np.float32(factor), tuple(noise), history)


def key_of(seed: int) -> jax.Array:
    """Return the key of a seed of up to 64 bits; for one of 32 bits it is jax.random.key(seed)."""
    high, low = divmod(seed, 2**32)
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key
