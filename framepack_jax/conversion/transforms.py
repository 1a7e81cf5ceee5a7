"""Layout changes between PyTorch tensors and our parameters, and the rows of the tables.

A row maps tensors (torch names) to leaves (our paths) by a transform. Most rows map one tensor to
one leaf; fused projections map three tensors to one leaf, or one to two. `{i}` and `{j}` in paths
and names stand for layer numbers. Transforms move numbers and never change them, except `Inflate`
and `Fresh`, which start a FramePack model from a base model.

Shapes: D width, C channels; matrices are (out, in) in torch and (in, ...out) here.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]
Names = str | Sequence[str]


class Transform(Protocol):
    """A layout change from tensors (`sources`) to leaves (`targets`)."""

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        """Return the shapes of `count` tensors that fill leaves of shapes `targets`."""
        ...

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        """Return the leaves made of `sources`."""
        ...


@dataclasses.dataclass(frozen=True)
class Row:
    """Make leaves `targets` of tensors `sources` by `transform`."""

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    transform: Transform


class Copy:
    """Copy one tensor to one leaf: norms and embeddings."""

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        return targets

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        return sources


class Unbatched:
    """A table that torch stores with an axis for the batch: (1, ...) -> (...)."""

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        return [(1, *targets[0])]

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        return [sources[0][0]]


@dataclasses.dataclass(frozen=True)
class Linear:
    """Turn torch matrices (out, in) or vectors (out,) into kernels (in, ...out) or biases (...out).

    The sources are equal parts of one fused tensor along its outputs. The targets are parts of it
    along `split`: 0 outputs, 1 inputs.
    """

    split: int = 0
    is_bias: bool = False

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        parts = [self._flat(target) for target in targets]
        fused = list(parts[0])
        fused[self.split] = sum(part[self.split] for part in parts)
        return [(fused[0] // count, *fused[1:])] * count

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        fused = sources[0] if len(sources) == 1 else np.concatenate(sources)
        ends = np.cumsum([self._flat(target)[self.split] for target in targets])
        parts = np.split(fused, ends[:-1], axis=self.split)
        return [part.T.reshape(target) for part, target in zip(parts, targets, strict=True)]

    def _flat(self, target: Shape) -> Shape:
        """Return the torch shape of a part."""
        return (math.prod(target),) if self.is_bias else (math.prod(target[1:]), target[0])


@dataclasses.dataclass(frozen=True)
class Swapped:
    """Swap the two halves of the outputs: (shift, scale) <-> (scale, shift)."""

    inner: Linear

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        return self.inner.source_shapes(targets, count)

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        swapped = [np.roll(source, len(source) // 2, axis=0) for source in sources]
        return self.inner(swapped, targets)


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """A linear layer that torch stores as a convolution: matrices (out, in, 1, 1, 1), with as many
    `ones` as the convolution has dimensions."""

    inner: Linear
    ones: int = 3

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        ones = (1,) * self.ones
        return [(*shape, *ones) for shape in self.inner.source_shapes(targets, count)]

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        matrices = [source.reshape(source.shape[: -self.ones]) for source in sources]
        return self.inner(matrices, targets)


@dataclasses.dataclass(frozen=True)
class Vector:
    """A vector (C,) that torch stores with dimensions for broadcasting: (C, 1, 1, 1)."""

    ones: int

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        return [(*targets[0], *(1,) * self.ones)]

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        return [sources[0].reshape(targets[0])]


class Conv:
    """A convolution: torch (out, in, *kernel) -> (*kernel, in, out)."""

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        *kernel, channels, width = targets[0]
        return [(width, channels, *kernel)]

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        return [np.moveaxis(sources[0], (1, 0), (-2, -1))]


class Conv2d:
    """A convolution of single frames: torch (out, in, kh, kw) -> (1, kh, kw, in, out)."""

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        _, *kernel, channels, width = targets[0]
        return [(width, channels, *kernel)]

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        return [np.moveaxis(sources[0], (1, 0), (-2, -1))[None]]


@dataclasses.dataclass(frozen=True)
class Patch:
    """A convolution without overlap as a matrix: torch (D, C, *kernel) -> (*kernel C, D)."""

    kernel: Shape

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        rows, width = targets[0]
        return [(width, rows // math.prod(self.kernel), *self.kernel)]

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        return [np.moveaxis(sources[0], (1, 0), (-2, -1)).reshape(targets[0])]


@dataclasses.dataclass(frozen=True)
class Inflate:
    """Repeat a small patch kernel on a larger grid, divided by the number of repeats.

    Latents that are enlarged by repetition then have the embeddings of the small latents. Sides
    that are no multiple share the weights of the small cells by their overlap (ours).
    """

    small: Shape
    kernel: Shape

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        rows, width = targets[0]
        return [(width, rows // math.prod(self.kernel), *self.small)]

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        weights = sources[0].astype(np.float32)
        for axis, sides in enumerate(zip(self.small, self.kernel, strict=True), 2):
            shared = np.tensordot(weights, _overlaps(*sides), axes=(axis, 0))
            weights = np.moveaxis(shared, -1, axis)
        return Patch(self.kernel)([weights.astype(sources[0].dtype)], targets)


def _overlaps(small: int, large: int) -> np.ndarray:
    """Return the overlap (small, large) of each cell of a side with each of its larger grid, as a
    fraction of a small cell."""
    edges = np.arange(large + 1) * small / large
    cells = np.arange(small)[:, None]
    shared = np.minimum(edges[1:], cells + 1) - np.maximum(edges[:-1], cells)
    return np.maximum(shared, 0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Fresh:
    """New weights that no checkpoint has: LeCun normal by `seed`, or zeros if it is None."""

    seed: str | None = None

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        return []

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        (shape,) = targets
        if self.seed is None:
            return [np.zeros(shape, np.float32)]
        generator = np.random.default_rng(zlib.crc32(self.seed.encode()))
        return [generator.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))]


def linear(targets: Names, sources: Names, *, bias: bool = True, swap: bool = False) -> list[Row]:
    """Return rows for a linear layer; several sources or targets are parts of a fused layer."""
    targets, sources = _names(targets), _names(sources)

    def row(leaf: str, tensor: str, transform: Linear) -> Row:
        return Row(
            tuple(f"{target}/{leaf}" for target in targets),
            tuple(f"{source}.{tensor}" for source in sources),
            Swapped(transform) if swap else transform,
        )

    rows = [row("kernel", "weight", Linear())]
    return [*rows, row("bias", "bias", Linear(is_bias=True))] if bias else rows


def norm(target: str, source: str, *, bias: bool = True) -> list[Row]:
    """Return rows for the scale and, if `bias`, the bias of a norm."""
    rows = [Row((f"{target}/scale",), (f"{source}.weight",), Copy())]
    return [*rows, Row((f"{target}/bias",), (f"{source}.bias",), Copy())] if bias else rows


def kernel(target: str, source: str, transform: Transform) -> list[Row]:
    """Return rows for the kernel, by `transform`, and the bias of a convolution."""
    return [
        Row((f"{target}/kernel",), (f"{source}.weight",), transform),
        Row((f"{target}/bias",), (f"{source}.bias",), Copy()),
    ]


def embedding(target: str, source: str) -> list[Row]:
    """Return the row of an embedding table."""
    return [Row((f"{target}/embedding",), (f"{source}.weight",), Copy())]


def each(pattern: str, parts: str = "qkv") -> tuple[str, ...]:
    """Replace "*" by each part: "attn.to_*" -> attn.to_q, attn.to_k, attn.to_v."""
    return tuple(pattern.replace("*", part) for part in parts)


def _names(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
