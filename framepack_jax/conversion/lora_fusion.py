"""Convert low-rank factors between torch modules and our kernels, exactly.

Torch modules have factors `down` (r, in) and `up` (out, r). Modules and kernels do not map one to
one. The rows of the transformer's tables say which belong together; each row has one fused matrix:

    modules -> joined along their outputs -> one pair of factors -> cut -> kernels, and back.

A cut splits one factor, copies the other, and drops ranks that are zero. A join of parts with a
common factor reverts a cut. A join of other parts is the exact block-diagonal matrix, with the sum
of their ranks. Separate q, k and v (diffusers) therefore become one kernel with three times the
rank, and can be separated again; a kernel trained here is written for diffusers at its own rank.
Ranks also grow in Tencent's fused `linear1`, and in the output projection of single blocks, which
is two kernels here.

Shapes: r rank; torch modules (out, in), our kernels (in, ...out).
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from framepack_jax.conversion.engine import Step, Table, steps_of
from framepack_jax.conversion.transforms import Linear, Patch, Swapped
from framepack_jax.models.lora import Factors, alike


class Pair(NamedTuple):
    """Factors of a matrix (out, in): up (out, r), diagonal scale (r,), down (r, in)."""

    down: np.ndarray
    up: np.ndarray
    scale: np.ndarray

    @property
    def transposed(self) -> "Pair":
        """Return the factors of the transposed matrix, whose outputs are the inputs of this one."""
        return Pair(self.up.T, self.down.T, self.scale)


@functools.lru_cache(maxsize=8)
def kernel_steps(table: Table, cfg: Any) -> tuple[Step, ...]:
    """Return the rows of a table that make kernels, layer by layer (cached)."""
    steps = steps_of(table, cfg)
    return tuple(s for s in steps if all(t.endswith("/kernel") for t in s.targets))


def module_names(step: Step) -> list[str]:
    """Return the dotted names of a step's modules."""
    return [source.removesuffix(".weight") for source in step.sources]


def pair_of(step: Step, down: np.ndarray, up: np.ndarray, scale: np.ndarray) -> Pair:
    """Make a pair of a module's tensors: (r, in) and (out, r), or those of a convolution."""
    up = up.reshape(up.shape[:2])
    if not isinstance(step.row.transform, Patch):
        return Pair(down.reshape(down.shape[:2]), up, scale)
    (kernel,) = step.targets.values()
    (columns,) = step.row.transform([down], [(kernel[0], len(down))])
    return Pair(columns.T, up, scale)


def tensors_of(step: Step, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Return the tensors `down` and `up` of a module; the inverse of `pair_of`."""
    if not isinstance(step.row.transform, Patch):
        return pair.down, pair.up
    rows = pair.down.reshape(len(pair.down), *step.row.transform.kernel, -1)
    return np.moveaxis(rows, -1, 1), pair.up.reshape(*pair.up.shape, 1, 1, 1)


def folded(pair: Pair) -> Pair:
    """Multiply the scale into `up`, so that it becomes 1.

    `up` keeps its dtype if all products are exact in it, as for powers of two; otherwise both
    factors become float32.
    """
    if (pair.scale == 1).all():
        return pair
    exact = pair.up.astype(np.float32) * pair.scale.astype(np.float32)
    up, one = exact.astype(pair.up.dtype), np.ones_like(pair.scale)
    if np.array_equal(up.astype(np.float32), exact):
        return Pair(pair.down, up, one)
    return Pair(pair.down.astype(np.float32), exact, one)


def padded(pair: Pair, rank: int) -> Pair:
    """Pad factors of scale 1 with zeros to a rank."""
    more = rank - len(pair.down)
    down = np.pad(pair.down, ((0, more), (0, 0)))
    return Pair(down, np.pad(pair.up, ((0, 0), (0, more))), np.ones(rank))


def trimmed(pair: Pair) -> Pair:
    """Drop the ranks that are zero in both factors, such as those of `padded`."""
    used = pair.down.any(axis=1) | pair.up.any(axis=0)
    if used.all() or not used.any():
        return pair
    return Pair(pair.down[used], pair.up[:, used], pair.scale[used])


def to_kernels(step: Step, pairs: Mapping[str, Pair]) -> Iterator[tuple[str, Factors]]:
    """Yield path and factors of the kernels that the modules of a step change."""
    parts = [pairs.get(name) for name in module_names(step)]
    if not any(parts):
        return
    outputs = step.source_shapes()[0][0]
    fused = _join(parts, [outputs] * len(parts))
    if isinstance(step.row.transform, Swapped):
        fused = _swapped(fused)
    along, sizes = _layout(step)
    cut = _cut(along(fused), sizes)
    for (kernel, shape), part in zip(step.targets.items(), cut, strict=True):
        if part is not None:
            down, up, scale = along(part)
            b = np.ascontiguousarray(up.T).reshape(len(down), *shape[1:])
            yield kernel, Factors(np.ascontiguousarray(down.T), b, scale)


def to_modules(step: Step, lora: Mapping[str, Factors]) -> Iterator[tuple[str, Pair]]:
    """Yield dotted name and factors of the modules that hold the change of a step's kernels."""
    parts = [lora.get(kernel) for kernel in step.targets]
    if not any(parts):
        return
    along, sizes = _layout(step)
    pairs = [p and along(Pair(p.a.T, p.b.reshape(p.rank, -1).T, p.scale)) for p in parts]
    fused = along(_join(pairs, sizes))
    if isinstance(step.row.transform, Swapped):
        fused = _swapped(fused)
    names = module_names(step)
    outputs = step.source_shapes()[0][0]
    for name, pair in zip(names, _cut(fused, [outputs] * len(names)), strict=True):
        if pair is not None:
            yield name, pair


def _layout(step: Step) -> tuple[Callable[[Pair], Pair], list[int]]:
    """Return the layout of kernels in the fused matrix: a function that transposes it if kernels
    are parts of its inputs, and the length of each part."""
    transform = step.row.transform
    shapes = step.targets.values()
    if isinstance(transform, Linear) and transform.split == 1:
        return lambda pair: pair.transposed, [shape[0] for shape in shapes]
    return lambda pair: pair, [math.prod(shape[1:]) for shape in shapes]


def _swapped(pair: Pair) -> Pair:
    return pair._replace(up=np.roll(pair.up, len(pair.up) // 2, axis=0))


def _join(parts: Sequence[Pair | None], sizes: list[int]) -> Pair:
    """Join the factors of matrices with `sizes` outputs into those of one matrix, along outputs;
    None is a matrix of zeros."""
    there = [part for part in parts if part is not None]
    downs, ups, scales = (alike(arrays) for arrays in zip(*there, strict=True))
    if all(map(np.array_equal, downs[1:], downs)) and all(map(np.array_equal, scales[1:], scales)):
        # The parts share `down`: they were cut from one matrix.
        down, scale, begins = downs[0], scales[0], np.zeros(len(there), int)
    else:
        down, scale = np.concatenate(downs), np.concatenate(scales)
        begins = np.cumsum([0, *map(len, downs[:-1])])
    up = np.zeros((sum(sizes), len(down)), ups[0].dtype)
    rows = np.split(up, np.cumsum(sizes)[:-1])
    filled = [row for row, part in zip(rows, parts, strict=True) if part is not None]
    for row, part, begin in zip(filled, ups, begins, strict=True):
        row[:, begin : begin + part.shape[1]] = part
    return Pair(down, up, scale)


def _cut(pair: Pair, sizes: list[int]) -> list[Pair | None]:
    """Cut factors into parts with `sizes` outputs; the inverse of `_join`.

    Each part keeps the ranks that change it, and is None if there are none. If `up` is zero, as
    before training, every part keeps all ranks.
    """
    ups = np.split(pair.up, np.cumsum(sizes)[:-1])
    if len(ups) == 1 or not pair.up.any():
        return [pair._replace(up=up) for up in ups]
    used = [up.any(axis=0) for up in ups]
    return [
        Pair(pair.down[u], up[:, u], pair.scale[u]) if u.any() else None
        for up, u in zip(ups, used, strict=True)
    ]
