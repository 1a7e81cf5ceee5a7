"""Sections of raw videos, decoded in training and encoded by the VAE in the step.

Only a window of a clip is decoded: the frames of the positions that a section reads and writes, and
one frame before. The VAE encodes that frame first, and its latent is dropped, as in the temporal
tiles of the VAE. These latents differ slightly from those of the whole clip, as the norms of the
VAE span time.

Shapes: B batch, S latent positions of a window, w latent window, H W pixels, h w latents.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from framepack_jax.data.batch import Array, Batch, Conditions, Meta
from framepack_jax.packing import MISSING, PackedContext, Section

# Rows of the table that a section is gathered from: nothing, the start latent, the window.
NOTHING, START, WINDOW = 0, 1, 2


@struct.dataclass
class PixelBatch:
    """`start_frame` (B, 1, H, W, 3) and `frames` (B, 1 + 4 S, H, W, 3) uint8; `target_at` (B, w)
    and, for each context group, `reads_at` (B, n) rows of [zeros, start latent, window]; the rest
    as in `Batch`."""

    start_frame: Array
    frames: Array
    target_at: Array
    reads_at: tuple[Array, ...]
    given: tuple[Array, ...]
    indices: tuple[Array, ...]
    target_indices: Array
    kernels: tuple[str, ...] = struct.field(pytree_node=False)
    conditions: Conditions
    meta: Meta


class Window(NamedTuple):
    """Latent positions `first` .. `first + size - 1` of a clip, where `first` is 1 or more."""

    first: int
    size: int

    def frames(self, time_compression: int) -> tuple[int, int]:
        """Return (first frame, number of frames) of its positions and one frame before."""
        return time_compression * (self.first - 1), 1 + time_compression * self.size


def window_of(section: Section, length: int, size: int) -> Window:
    """Return `size` positions of a clip of `length` that contain the reads and writes of a
    section."""
    used = [p for group in section.groups for p in group.reads if p not in (MISSING, 0)]
    first = min((*used, *section.targets))
    return Window(max(1, min(first, length - size)), size)


def rows(positions: tuple[int, ...], window: Window) -> np.ndarray:
    """Convert positions to rows of [zeros, start latent, window], int32."""
    special = {MISSING: NOTHING, 0: START}
    return np.asarray([special.get(p, p - window.first + WINDOW) for p in positions], np.int32)


def to_batch(batch: PixelBatch, encode: Callable[[jax.Array], jax.Array]) -> Batch:
    """Encode the frames of a batch. `encode` maps (B, P, H, W, 3) in [-1, 1] to normalised latents
    (B, 1 + (P - 1) / 4, h, w, C)."""
    start = encode(signed(batch.start_frame))
    window = encode(signed(batch.frames))[:, 1:]
    table = jnp.concatenate([jnp.zeros_like(start), start, window], axis=1).astype(jnp.bfloat16)
    # The latents are data: no gradient flows through them.
    table = jax.lax.stop_gradient(table)

    def gather(at: jax.Array) -> jax.Array:
        return jnp.take_along_axis(table, at[:, :, None, None, None], axis=1)

    return Batch(
        target=gather(batch.target_at),
        context=PackedContext(
            tuple(gather(at) for at in batch.reads_at), batch.indices, batch.target_indices,
            batch.kernels,
        ),
        given=batch.given, conditions=batch.conditions, meta=batch.meta,
    )  # fmt: skip


def signed(frames: jax.Array) -> jax.Array:
    """Convert uint8 to float32 in [-1, 1]."""
    return frames.astype(jnp.float32) / 127.5 - 1
