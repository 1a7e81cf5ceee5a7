"""Change the history of training samples: drop it, or add noise, as sampled history has errors.

Sources: Helios (arXiv 2603.04379): history dropout for text-to-video, corrupted history against
drift. FramePack (arXiv 2504.12626), table 2: noisy history, after Diffusion Forcing. All draws of a
sample derive from its key.

Shapes: B batch, F frames of a context group, h W latent rows and columns, C channels.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax.diffusion import flow
from framepack_jax.diffusion.history_noise import noised
from framepack_jax.packing import PackedContext
from framepack_jax.training.config import HistoryConfig
from framepack_jax.training.draws import Draw
from framepack_jax.training.flow_matching import normal, uniform

# Corruption of mode "random" (Helios): the share of samples that get noise, and the smallest scale
# to which the frames of the others are reduced before they are enlarged again.
NOISED_SHARE, MIN_SCALE = 0.9, 0.9


@dataclasses.dataclass(frozen=True)
class Places:
    """Which frame of the context is what.

    Args:
        ages: Place of each frame of each group in the history, see `packing.history_ages`.
        window: Latent frames of a section.
        given: Whether a frame is the start image, by group (B, F); it may be history as well.
    """

    ages: Sequence[Sequence[int]]
    window: int
    given: Sequence[jax.Array]

    def history(self, group: int) -> jax.Array:
        """Return a mask (1, F) of the frames that are history, and no anchor."""
        return jnp.asarray(self.ages[group])[None] >= 0

    def start(self, group: int) -> jax.Array:
        """Return a mask (B, F) of anchor and start image."""
        return ~self.history(group) | jnp.asarray(self.given[group])


def change_history(
    cfg: HistoryConfig,
    context: PackedContext,
    places: Places,
    keys: jax.Array,
    sigmas: jax.Array,
) -> PackedContext:
    """Return a context with history dropped and noised as configured. Missing frames stay zero.

    Args:
        cfg: Probabilities and levels.
        context: Context of the samples (B, F, h, W, C) by group.
        places: What the frames of the context are.
        keys: Keys of the samples (B,).
        sigmas: Noise levels of the targets (B,).
    """
    if not any((cfg.drop_all, cfg.drop_oldest, cfg.drop_history, cfg.drop_start, cfg.noisy,
                cfg.corrupt, cfg.anchor_noise)):  # fmt: skip
        return context
    dropped = [_dropped(cfg, group, places, keys) for group in range(len(context.latents))]
    latents = []
    for group, frames in enumerate(map(jnp.asarray, context.latents)):
        kept = _chosen(dropped[group], jnp.zeros_like(frames), frames)
        latents.append(_noised(cfg, group, kept, places, keys, sigmas))
    masked = context.masked
    if masked is not None:
        # A tail ta, the first group, has no tokens if all of it is dropped.
        masked = jnp.where(dropped[0].all(axis=1), context.tail_tokens, masked)
    return dataclasses.replace(context, latents=tuple(latents), masked=masked)


def _dropped(cfg: HistoryConfig, group: int, places: Places, keys: jax.Array) -> jax.Array:
    """Return a mask (B, F) of the frames that are left out."""

    def samples(draw: Draw, share: float) -> jax.Array:
        return (uniform(keys, draw) < share)[:, None]

    start = places.start(group)
    length = 1 + max((age for ages in places.ages for age in ages), default=-1)
    choices = 1 + max(length - 1, 0) // places.window
    number = jnp.minimum(jnp.floor(uniform(keys, Draw.OLDEST) * choices), choices - 1)
    count = 1 + places.window * number[:, None]
    oldest = places.history(group) & (jnp.asarray(places.ages[group])[None] < count)
    return (
        samples(Draw.DROP_ALL, cfg.drop_all)
        | (samples(Draw.DROP_OLDEST, cfg.drop_oldest) & oldest)
        | (samples(Draw.DROP_HISTORY, cfg.drop_history) & ~start)
        | (samples(Draw.DROP_START, cfg.drop_start) & start)
    )


def _noised(
    cfg: HistoryConfig,
    group: int,
    latents: jax.Array,
    places: Places,
    keys: jax.Array,
    sigmas: jax.Array,
) -> jax.Array:
    """Add noise to the frames of a group. Missing frames, which are zero, stay zero."""
    frames, start = latents.shape[:2], places.start(group)
    made = latents.astype(jnp.float32)
    if cfg.corrupt:
        made = _corrupted(cfg, group, latents, keys)
    if cfg.noisy:
        random = cfg.noisy == "random"
        factor = uniform(keys, Draw.NOISY_FACTOR) if random else float(cfg.noisy)
        levels = jnp.broadcast_to((factor * sigmas)[:, None], frames)
        noise = normal(keys, Draw.NOISY_NOISE, latents.shape[1:], group)
        made = noised(latents, noise, levels, ~start)
    if cfg.anchor_noise is not None:
        low, high = cfg.anchor_noise
        levels = low + (high - low) * _by_frame(keys, Draw.ANCHOR_LEVEL, group, frames[1])
        noise = normal(keys, Draw.ANCHOR_NOISE, latents.shape[1:], group)
        made = _chosen(start, _interpolate(latents, noise, levels), made)
    present = jnp.any(latents != 0, axis=(2, 3, 4))
    return _chosen(present, made, latents).astype(latents.dtype)


def _corrupted(cfg: HistoryConfig, group: int, latents: jax.Array, keys: jax.Array) -> jax.Array:
    """Return latents that are corrupted in all but the clean samples."""
    one_level = cfg.corrupt_mode == "sample"
    if one_level:
        levels = jnp.broadcast_to(uniform(keys, Draw.SAMPLE_LEVEL)[:, None], latents.shape[:2])
    else:
        levels = _by_frame(keys, Draw.FRAME_LEVEL, group, latents.shape[1])
    draw = Draw.SAMPLE_NOISE if one_level else Draw.FRAME_NOISE
    noise = normal(keys, draw, latents.shape[1:], group)
    made = _interpolate(latents, noise, cfg.corrupt * levels)
    if cfg.corrupt_mode == "random":
        scales = MIN_SCALE + (1 - MIN_SCALE) * uniform(keys, Draw.RESAMPLE_SCALE)
        noised = (uniform(keys, Draw.RESAMPLE) < NOISED_SHARE)[:, None]
        made = _chosen(noised, made, resampled(latents, scales))
    clean = (uniform(keys, Draw.CLEAN) < cfg.clean)[:, None]
    return _chosen(clean, latents.astype(made.dtype), made)


def resampled(latents: jax.Array, scales: jax.Array) -> jax.Array:
    """Reduce latents (B, F, h, W, C) by scales (B,) from MIN_SCALE to 1, and enlarge them again,
    both bilinearly, as torch's `interpolate` does."""
    made = latents.astype(jnp.float32)
    for axis, rule in ((2, "bij,bfjwc->bfiwc"), (3, "bij,bfhjc->bfhic")):
        size = latents.shape[axis]
        sizes = jnp.floor(scales * size).astype(jnp.int32)
        matrices = jnp.asarray(_down_and_up(size))[jnp.maximum(sizes - _smallest(size), 0)]
        made = jnp.einsum(rule, matrices, made)
    return made


def _smallest(size: int) -> int:
    return max(1, int(MIN_SCALE * size))


@functools.cache
def _down_and_up(size: int) -> np.ndarray:
    """Return matrices (sizes, size, size) that reduce `size` values and enlarge them again, for
    each size that a scale gives."""
    smaller = range(_smallest(size), size + 1)
    made = [_bilinear(small, size) @ _bilinear(size, small) for small in smaller]
    return np.stack(made).astype(np.float32)


def _bilinear(size: int, to: int) -> np.ndarray:
    """Return the matrix (to, size) of linear interpolation between the centres of cells."""
    at = np.clip((np.arange(to) + 0.5) * size / to - 0.5, 0, size - 1)
    first = np.floor(at).astype(int)
    share, rows = at - first, np.arange(to)
    matrix = np.zeros((to, size))
    matrix[rows, first] += 1 - share
    matrix[rows, np.minimum(first + 1, size - 1)] += share
    return matrix


def _interpolate(latents: jax.Array, noise: jax.Array, levels: jax.Array) -> jax.Array:
    """Noise each frame of latents to its level (B, F)."""
    return jax.vmap(flow.interpolate)(latents, noise, levels)


def _by_frame(keys: jax.Array, draw: Draw, group: int, count: int) -> jax.Array:
    """Draw numbers in [0, 1) for each frame of a group, (B, count)."""

    def one(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, draw), group)
        return jax.random.uniform(key, (count,))

    return jax.vmap(one)(keys)


def _chosen(mask: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `a` for frames where the mask (B, F) or (B, 1) is True, else `b`."""
    return jnp.where(mask[:, :, None, None, None], a, b)
