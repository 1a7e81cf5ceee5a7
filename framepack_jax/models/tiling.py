"""Encode or decode a video tile by tile, and cross-fade the tiles.

Temporal tiles follow diffusers' `AutoencoderKLHunyuanVideo`. Spatial tiles all have the same shape,
also at the border, unless their axis is `narrow`.

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Network = Callable[[jax.Array], jax.Array]
"""Encoder or decoder: (B, T, H, W, C) -> (B, T, H, W, C) at another resolution."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Division of a long or large video into tiles, in pixels and frames of the video.

    Clips have `frames` + 1 frames and start every `frame_stride`; squares have side `size` and
    start every `stride`, except that the last ends where the video does. Neighbours are
    cross-faded where they overlap. None takes the whole length or area at once. The default is
    diffusers' own; after `enable_tiling()` diffusers takes squares of 256 every 192, and narrower
    ones at the border.
    """

    frames: int | None = 16
    frame_stride: int = 12
    size: int | None = None
    stride: int | None = None


DEFAULT_TILING = Tiling()


class TileAxis(NamedTuple):
    """Tiles along time or space: size and stride, in the input and in the output.

    If `narrow`, all tiles begin a stride apart, and those at the border are cut off there, as in
    diffusers; else the last tile begins earlier.
    """

    size: int
    stride: int
    out_size: int
    out_stride: int
    narrow: bool = False

    @property
    def out_overlap(self) -> int:
        return self.out_size - self.out_stride

    def out(self, length: int) -> int:
        """Convert a length in the input to one in the output."""
        return length * self.out_size // self.size

    def starts(self, length: int) -> list[int]:
        """Return where tiles begin: a stride apart, but the last one ends where the input does.

        So all have one shape, and none is a sliver whose norms see little. If `narrow`, all are a
        stride apart.
        """
        if self.narrow:
            return list(range(0, length, self.stride))
        last = max(0, length - self.size)
        return sorted({min(start, last) for start in range(0, length, self.stride)})

    def overlap(self, starts: list[int], number: int) -> int:
        """Return the overlap of a tile in the output with the one before it."""
        return self.out(starts[number - 1] + self.size - starts[number])

    def swapped(self) -> "TileAxis":
        """Swap input and output."""
        return TileAxis(self.out_size, self.out_stride, self.size, self.stride, self.narrow)


def encoder_axes(
    tiling: Tiling, time_compression: int, space_compression: int, narrow: bool = False
) -> tuple[TileAxis | None, TileAxis | None]:
    """Return the tiles of an encoder in time and in space; None if it takes all at once.

    `narrow` is that of the tiles in space. Raises ValueError if the tiles are no multiples of the
    compression.
    """

    def axis(name: str, size: int | None, stride: int | None, ratio: int) -> TileAxis | None:
        if size is None:
            return None
        if stride is None or not 0 < stride <= size or size % ratio or stride % ratio:
            raise ValueError(
                f"VAE tiling: {name} {size} at a stride of {stride}; both must be multiples of"
                f" {ratio}, and the stride no longer than the tile"
            )
        return TileAxis(size, stride, size // ratio, stride // ratio, narrow)

    return (
        axis("frames", tiling.frames, tiling.frame_stride, time_compression),
        axis("size", tiling.size, tiling.stride, space_compression),
    )


def narrow_squares(
    tiling: Tiling, time_compression: int, space_compression: int
) -> TileAxis | None:
    """Return the spatial tiles of an encoder whose norms see one cell each, so that narrow tiles do
    not harm. Raises ValueError as `encoder_axes`."""
    whole = dataclasses.replace(tiling, frames=None)
    return encoder_axes(whole, time_compression, space_compression, narrow=True)[1]


def apply_tiled(
    network: Network, x: jax.Array, time: TileAxis | None, space: TileAxis | None
) -> jax.Array:
    """Compute network(x), tile by tile if x is longer or larger than a tile."""

    def clip(x: jax.Array) -> jax.Array:
        if space is None or max(x.shape[2:4]) <= space.size:
            return network(x)
        return _tiled_space(network, x, space)

    return _tiled_time(clip, x, time) if time and x.shape[1] > time.size else clip(x)


def _tiled_time(network: Network, x: jax.Array, axis: TileAxis) -> jax.Array:
    """Compute clips that share one frame with the next.

    The shared frame is the single first frame of the later clip, and dropped there. (A last clip of
    that frame alone has nothing to add.)
    """
    kept: list[jax.Array] = []
    clip: jax.Array | None = None
    for start in range(0, x.shape[1] - 1, axis.stride):
        new = network(x[:, start : start + axis.size + 1])
        clip = new if clip is None else _blend(clip, new[:, 1:], axis.out_overlap, 1)
        kept.append(clip[:, : axis.out_stride + (start == 0)])
    return jnp.concatenate(kept, axis=1)


def _tiled_space(network: Network, x: jax.Array, axis: TileAxis) -> jax.Array:
    """Compute squares in reading order, each faded over the finished ones above and to the left."""
    tops, lefts = axis.starts(x.shape[2]), axis.starts(x.shape[3])
    rows: list[list[jax.Array]] = []
    for top in tops:
        row: list[jax.Array] = []
        for left in lefts:
            tile = network(x[:, :, top : top + axis.size, left : left + axis.size])
            if rows:
                tile = _blend(rows[-1][len(row)], tile, axis.overlap(tops, len(rows)), 2)
            if row:
                tile = _blend(row[-1], tile, axis.overlap(lefts, len(row)), 3)
            row.append(tile)
        rows.append(row)
    bands = [_joined(row, lefts, axis, 3) for row in rows]
    return _joined(bands, tops, axis, 2)


def _joined(tiles: list[jax.Array], starts: list[int], axis: TileAxis, dimension: int) -> jax.Array:
    """Join tiles, each up to where the next begins."""
    *others, last = tiles
    kept = [
        jax.lax.slice_in_dim(tile, 0, axis.out(after - start), axis=dimension)
        for tile, (start, after) in zip(others, itertools.pairwise(starts), strict=True)
    ]
    return jnp.concatenate([*kept, last], axis=dimension)


@functools.partial(jax.jit, static_argnames=("overlap", "axis"))
def _blend(before: jax.Array, after: jax.Array, overlap: int, axis: int) -> jax.Array:
    """Cross-fade the first cells of `after` along `axis` with the last ones of `before`.

    Cell i has weight i / n of `after`, where n is `overlap` or the length of the shorter tile.
    """
    n = min(overlap, before.shape[axis], after.shape[axis])
    old = jax.lax.slice_in_dim(before, before.shape[axis] - n, None, axis=axis)
    new, rest = jnp.split(after, [n], axis=axis)
    ramp = np.arange(n) / max(n, 1)
    ramp = np.expand_dims(ramp, [i for i in range(after.ndim) if i != axis])
    weight = jnp.asarray(ramp, jnp.float32)
    faded = old * (1 - weight) + new * weight
    return jnp.concatenate([faded.astype(after.dtype), rest], axis=axis)
