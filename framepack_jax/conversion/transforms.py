"""How PyTorch tensors and parameters here hold the same numbers, and the rows of the tables.

A row says: these leaves (paths here) hold what those tensors (torch names) hold, in this layout.
Most rows go one to one; fused projections go three to one, one to two. `{i}` and `{j}` in paths
and names stand for layer numbers. Transforms move numbers and never change them, but for `Inflate`
and `Fresh`, which begin a FramePack model from a base model.

Shapes: D width, C channels; torch keeps matrices as (out, in), here they are (in, ...out).
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
        """Shapes that `count` tensors must have to fill leaves of shapes `targets`."""
        ...

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        """The leaves."""
        ...


@dataclasses.dataclass(frozen=True)
class Row:
    """Leaves `targets` are made of tensors `sources` by `transform`."""

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    transform: Transform


class Copy:
    """One to one, as it is: norms and embeddings."""

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        return targets

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        return sources


@dataclasses.dataclass(frozen=True)
class Linear:
    """torch matrices (out, in) or vectors (out,), equal parts of one fused tensor along its outputs
    -> kernels (in, ...out) or biases (...out), parts of it along `split`: 0 its outputs, 1 its
    inputs."""

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
        """The torch shape of a part."""
        return (math.prod(target),) if self.is_bias else (math.prod(target[1:]), target[0])


@dataclasses.dataclass(frozen=True)
class Swapped:
    """The two halves of the outputs trade places: (shift, scale) <-> (scale, shift)."""

    inner: Linear

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        return self.inner.source_shapes(targets, count)

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        swapped = [np.roll(source, len(source) // 2, axis=0) for source in sources]
        return self.inner(swapped, targets)


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """A linear layer that torch keeps as a convolution: matrices (out, in, 1, 1, 1)."""

    inner: Linear

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        return [(*shape, 1, 1, 1) for shape in self.inner.source_shapes(targets, count)]

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        return self.inner([source[..., 0, 0, 0] for source in sources], targets)


class Conv:
    """A convolution: torch (out, in, *kernel) -> (*kernel, in, out)."""

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        *kernel, channels, width = targets[0]
        return [(width, channels, *kernel)]

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        return [np.moveaxis(sources[0], (1, 0), (-2, -1))]


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
    """A small patch kernel repeated onto a larger grid and divided by the number of repeats.

    Latents enlarged by repetition then embed to what the small latents embed to.
    """

    small: Shape
    kernel: Shape

    def source_shapes(self, targets: list[Shape], count: int) -> list[Shape]:
        rows, width = targets[0]
        return [(width, rows // math.prod(self.kernel), *self.small)]

    def __call__(self, sources: list[np.ndarray], targets: list[Shape]) -> list[np.ndarray]:
        repeats = [large // small for large, small in zip(self.kernel, self.small, strict=True)]
        weights = sources[0] / sources[0].dtype.type(math.prod(repeats))
        for axis, times in enumerate(repeats, 2):
            weights = np.repeat(weights, times, axis=axis)
        return Patch(self.kernel)([weights], targets)


@dataclasses.dataclass(frozen=True)
class Fresh:
    """Weights that no checkpoint has: LeCun-normal of `seed`, or zeros where it is None."""

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
    """Kernel and bias of a linear layer; several sources or targets are parts of a fused one."""
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
    """Scale and, where it has one, bias of a norm."""
    rows = [Row((f"{target}/scale",), (f"{source}.weight",), Copy())]
    return [*rows, Row((f"{target}/bias",), (f"{source}.bias",), Copy())] if bias else rows


def kernel(target: str, source: str, transform: Transform) -> list[Row]:
    """Kernel, by `transform`, and bias of a convolution."""
    return [
        Row((f"{target}/kernel",), (f"{source}.weight",), transform),
        Row((f"{target}/bias",), (f"{source}.bias",), Copy()),
    ]


def embedding(target: str, source: str) -> list[Row]:
    """An embedding table."""
    return [Row((f"{target}/embedding",), (f"{source}.weight",), Copy())]


def each(pattern: str, parts: str = "qkv") -> tuple[str, ...]:
    """ "attn.to_*" -> attn.to_q, attn.to_k, attn.to_v."""
    return tuple(pattern.replace("*", part) for part in parts)


def _names(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
