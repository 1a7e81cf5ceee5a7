"""Change the history of training samples: drop it, or add noise, as sampled history has errors.

Source: Helios (arXiv 2603.04379): history dropout for text-to-video, corrupted history against
drift. All draws of a sample derive from its key.

Shapes: B batch, F frames of a context group, h W latent rows and columns, C channels.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from framepack_jax.diffusion import flow
from framepack_jax.packing import PackedContext
from framepack_jax.training.config import HistoryConfig

# Numbers folded into the key of a sample, after those of `flow_matching`.
DROP_ALL, DROP_OLDEST, DROPPED, CLEAN, LEVEL, NOISE = range(16, 22)


def change_history(
    cfg: HistoryConfig,
    context: PackedContext,
    ages: Sequence[Sequence[int]],
    window: int,
    keys: jax.Array,
) -> PackedContext:
    """Return a context with history dropped and corrupted as configured.

    Args:
        cfg: Probabilities and levels.
        context: Context of the samples (B, F, h, W, C) by group.
        ages: Place of each frame of each group in the history, see `packing.history_ages`.
        window: Latent frames of a section.
        keys: Keys of the samples (B,).
    """
    if cfg.drop_all or cfg.drop_oldest:
        context = _dropped(cfg, context, ages, window, keys)
    return _corrupted(cfg, context, keys) if cfg.corrupt else context


def _dropped(
    cfg: HistoryConfig,
    context: PackedContext,
    ages: Sequence[Sequence[int]],
    window: int,
    keys: jax.Array,
) -> PackedContext:
    """Zero the frames that are left out, as those before the start of a video are."""
    length = 1 + max((age for group in ages for age in group), default=-1)
    all_of_it = _uniform(keys, DROP_ALL) < cfg.drop_all
    some = _uniform(keys, DROP_OLDEST) < cfg.drop_oldest
    choices = 1 + max(length - 1, 0) // window
    number = jnp.minimum(jnp.floor(_uniform(keys, DROPPED) * choices), choices - 1)
    # The anchor, whose age is -1, is kept.
    count = jnp.where(some, 1 + window * number, 0)
    latents = []
    for group, frames in zip(ages, context.latents, strict=True):
        age = jnp.asarray(group)
        oldest = (age[None] >= 0) & (age[None] < count[:, None])
        dropped = oldest | all_of_it[:, None]
        latents.append(jnp.where(dropped[:, :, None, None, None], 0, frames).astype(frames.dtype))
    return dataclasses.replace(context, latents=tuple(latents))


def _corrupted(cfg: HistoryConfig, context: PackedContext, keys: jax.Array) -> PackedContext:
    """Add noise at a level of its own to each frame, the anchor included. Some samples stay clean,
    and missing frames, which are zero, stay zero."""
    clean = _uniform(keys, CLEAN) < cfg.clean

    def corrupted(group: int, latents: jax.Array) -> jax.Array:
        def draws(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            level_key, noise_key = (
                jax.random.fold_in(jax.random.fold_in(key, draw), group) for draw in (LEVEL, NOISE)
            )
            levels = cfg.corrupt * jax.random.uniform(level_key, latents.shape[1:2])
            return levels, jax.random.normal(noise_key, latents.shape[1:])

        levels, noise = jax.vmap(draws)(keys)
        moved = jax.vmap(flow.interpolate)(latents, noise, levels)
        present = jnp.any(latents != 0, axis=(2, 3, 4), keepdims=True)
        changes = present & ~clean[:, None, None, None, None]
        return jnp.where(changes, moved, latents).astype(latents.dtype)

    latents = tuple(corrupted(i, jnp.asarray(x)) for i, x in enumerate(context.latents))
    return dataclasses.replace(context, latents=latents)


def _uniform(keys: jax.Array, draw: int) -> jax.Array:
    """Draw a number in [0, 1) for each sample, (B,)."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, draw)))(keys)
