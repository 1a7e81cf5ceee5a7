"""Discretized history, `+D`: every pixel of the history latents becomes its nearest codebook entry.

Source: arXiv 2504.12626, equation 6: k-means over latent pixels of a dataset. Ours, where the text
is silent: the history is discretized in sampling as well as in training, in normalised latent
space, before patches are made. Missing frames stay zero; the anchor, the ending of an endpoint
order and the target stay as they are. A tail is averaged first.

Shapes: N pixels, K entries, C latent channels; B batch, F frames, H W latent rows and columns.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax.packing.schedule import Schedule
from framepack_jax.packing.sections import MISSING, history_ages
from framepack_jax.packing.timeline import PackedContext

STEPS = 50
"""Number of Lloyd's steps of a fit."""
# Pixels whose distances to all entries are held at once.
CHUNK = 1 << 14


class Codebook(NamedTuple):
    """A fitted codebook: `entries` (K, C) float32, the fraction of pixels (K,) that each stands for
    (`usage`), and the mean squared distance of a pixel to its entry, relative to the variance of
    the pixels (`error`)."""

    entries: np.ndarray
    usage: np.ndarray
    error: float


def discretize(
    context: PackedContext, schedule: Schedule, entries: np.ndarray | None
) -> PackedContext:
    """Replace the pixels of the history by their nearest entries (K, C), if there are any."""
    return context if entries is None else _discretized(context, schedule, entries)


@functools.partial(jax.jit, static_argnames="schedule")
def _discretized(context: PackedContext, schedule: Schedule, entries: jax.Array) -> PackedContext:
    latents = []
    for ages, frames in zip(history_ages(schedule), context.latents, strict=True):
        present = jnp.any(frames != 0, axis=(2, 3, 4), keepdims=True)
        # Anchor and ending have no age.
        changes = present & (jnp.asarray(ages) != MISSING)[None, :, None, None, None]
        latents.append(jnp.where(changes, nearest(frames, entries), frames))
    return dataclasses.replace(context, latents=tuple(latents))


def nearest(latents: jax.Array | np.ndarray, entries: jax.Array | np.ndarray) -> jax.Array:
    """Return the entries (K, C) nearest to latents (..., C), in their dtype."""
    entries = jnp.asarray(entries)
    pixels = jnp.asarray(latents, jnp.float32).reshape(-1, latents.shape[-1])
    places = jax.vmap(_place, (0, None))(pixels, entries)
    return entries[places].reshape(latents.shape).astype(latents.dtype)


def fit(pixels: np.ndarray, count: int, seed: int = 0, steps: int = STEPS) -> Codebook:
    """Fit `count` entries to pixels (N, C) by k-means with k-means++ seeds (Arthur and
    Vassilvitskii, 2007) and Lloyd's steps. The most used entry comes first.

    Raises ValueError if there are fewer different pixels than entries.
    """
    different = len(np.unique(pixels, axis=0))
    if different < count:
        raise ValueError(
            f"a codebook of {count} entries needs as many different latent pixels, found"
            f" {different}; give a larger dataset or fewer entries"
        )
    mean = pixels.mean(0, dtype=np.float64).astype(np.float32)
    centred = jnp.asarray(pixels, jnp.float32) - mean[None]
    entries = _seeds(centred, count, jax.random.key(seed))
    entries, number, error = jax.device_get(_lloyd(centred, entries, steps))
    order = np.argsort(-number, kind="stable")
    usage = number[order] / len(pixels)
    spread = float(jnp.mean(jnp.square(centred)))
    return Codebook(entries[order] + mean, usage, float(error) / spread if spread else 0.0)


def _place(pixel: jax.Array, entries: jax.Array) -> jax.Array:
    """Return the number of the entry nearest to a pixel (C,)."""
    products = jnp.einsum("c,kc->k", pixel, entries, precision="highest")
    # The squared distance, without the squared length of the pixel.
    return jnp.argmin(jnp.sum(jnp.square(entries), axis=1) - 2 * products)


@functools.partial(jax.jit, static_argnums=1)
def _seeds(pixels: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """Draw entries from the pixels, each in proportion to its squared distance from those drawn."""

    def squared(entry: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(pixels - entry[None]), axis=1)

    def draw(number: jax.Array, drawn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        entries, distances = drawn
        chosen = jax.random.categorical(jax.random.fold_in(key, number), jnp.log(distances))
        entry = pixels[chosen]
        return entries.at[number].set(entry), jnp.minimum(distances, squared(entry))

    first = pixels[jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(pixels))]
    entries = jnp.zeros((count, pixels.shape[1]), jnp.float32).at[0].set(first)
    return jax.lax.fori_loop(1, count, draw, (entries, squared(first)))[0]


@functools.partial(jax.jit, static_argnums=2)
def _lloyd(
    pixels: jax.Array, entries: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return entries after some steps, the number of pixels of each, and the mean squared error."""

    def assign(entries: jax.Array) -> jax.Array:
        return jax.lax.map(lambda pixel: _place(pixel, entries), pixels, batch_size=CHUNK)

    def step(entries: jax.Array, _: None) -> tuple[jax.Array, None]:
        places = assign(entries)
        sums = jax.ops.segment_sum(pixels, places, len(entries))
        number = jax.ops.segment_sum(jnp.ones(len(pixels)), places, len(entries))[:, None]
        return jnp.where(number > 0, sums / jnp.maximum(number, 1), entries), None

    entries, _ = jax.lax.scan(step, entries, length=steps)
    places = assign(entries)
    number = jax.ops.segment_sum(jnp.ones(len(pixels), jnp.int32), places, len(entries))
    return entries, number, jnp.mean(jnp.square(pixels - entries[places]))
