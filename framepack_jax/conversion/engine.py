"""Match a table of rows with a checkpoint and a model.

`make_job` pairs every leaf of the model with its source tensors. It reports all problems together
(absent layers, missing tensors, wrong shapes, unknown tensors) before a byte is written.
`ConversionJob.leaves` then makes one leaf after another.
"""

import dataclasses
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from framepack_jax.conversion import arrays
from framepack_jax.conversion.memory import release_pages
from framepack_jax.conversion.transforms import Row, Shape
from framepack_jax.conversion.weight_files import Checkpoint, ConversionError
from framepack_jax.models import quantization, registry
from framepack_jax.utils import prefetch
from framepack_jax.utils.messages import first_line, shorten

DTYPES = ("float32", "bfloat16", "float16")
# Bytes that are read of mapped files before their pages are given back.
MAPPED = 256 << 20
# What tracing a network raises where its sizes do not go together.
NO_NETWORK = (ArithmeticError, TypeError, ValueError, RuntimeError, LookupError)
# Told the bytes that have been dealt with since it was told last.
Advance = Callable[[int], Any]


def silent(size: int) -> None:
    """Show no progress."""


def _no_ignored_keys(cfg: Any) -> tuple[str, ...]:
    return ()


@dataclasses.dataclass(frozen=True)
class Table:
    """One naming of one kind of network.

    A checkpoint that holds the tensor `detect_key`, behind any prefix, is in this naming, unless it
    holds `stranger` there too. `config` reads the model's config off a `Source`, `rows` are those
    for a config, and `ignored_keys` are regular expressions of names, without prefix, that may stay
    unused.
    """

    kind: str
    description: str
    detect_key: str
    rows: Callable[[Any], list[Row]]
    config: Callable[["Source"], Any]
    stranger: str | None = None
    ignored_keys: Callable[[Any], tuple[str, ...]] = _no_ignored_keys

    def prefixes_in(self, checkpoint: Checkpoint) -> list[str]:
        """Return the prefixes, "" or with a dot at the end, behind which a checkpoint holds
        networks in this naming."""
        found = (
            name.removesuffix(self.detect_key)
            for name in checkpoint.names()
            if f".{name}".endswith(f".{self.detect_key}")
        )
        return sorted(p for p in found if not self.stranger or p + self.stranger not in checkpoint)


@dataclasses.dataclass(frozen=True)
class Source:
    """A network of a checkpoint, read by a table; names are without prefix.

    `overrides` holds config fields that the user sets because the checkpoint may not state them.
    `like` is the config of the network that this one replaces: it tells what neither shapes nor a
    `config.json` tell. `others` are the prefixes of all networks in the checkpoint; `has_config`
    says whether the `config.json` beside it can be this network's.
    """

    checkpoint: Checkpoint
    table: Table
    prefix: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    like: Any = None
    others: tuple[str, ...] = ()
    has_config: bool = True

    def config_json(self) -> dict[str, Any] | None:
        """Return the fields of the `config.json` of this network, None if there is none."""
        return self.checkpoint.config() if self.has_config else None

    def names(self) -> Iterator[str]:
        """Yield the names, with prefix, that are this network's and no other's."""
        inner = tuple(p for p in self.others if p.startswith(self.prefix) and p != self.prefix)
        names = self.checkpoint.names()
        return (n for n in names if n.startswith(self.prefix) and not n.startswith(inner))

    def left_out(self) -> list[str]:
        """Return the names of the checkpoint's tensors that are no network's."""
        return [name for name in self.checkpoint.names() if not name.startswith(self.others)]

    def known_config(self, released: Any, name: str, size: Any) -> Any:
        """Return the released model's config or `like`, the first whose field `name` is `size`.
        Raises ConversionError."""
        for cfg in (released, self.like):
            if cfg is not None and getattr(cfg, name) == size:
                return cfg
        raise ConversionError(
            f"{self.checkpoint.path}: a {self.table.description} with {name} {size} needs its"
            " config.json beside it, in a file of its own, or --encoders-from a bundle that has one"
            f" with the same {name}; without, only one with {name} {getattr(released, name)} is"
            " known"
        )

    def has(self, name: str) -> bool:
        return self.prefix + name in self.checkpoint

    def shape(self, pattern: str) -> Shape:
        """Shape of a tensor, of any layer where the pattern has `{i}`. Raises ConversionError."""
        for name in self._matches(pattern):
            return self.checkpoint.shape(name.string)
        raise ConversionError(
            f"{self.checkpoint.path}: there is no tensor {self.prefix}{pattern}, which tells the"
            f" sizes of a {self.table.description}; is the file whole?"
        )

    def count(self, pattern: str) -> int:
        """One more than the highest `{i}` of a pattern."""
        return max((int(match["i"]) + 1 for match in self._matches(pattern)), default=0)

    def _matches(self, pattern: str) -> Iterator[re.Match[str]]:
        expression = _expression(self.prefix + pattern)
        return filter(None, map(expression.fullmatch, self.checkpoint.names()))

    def require(self, fields: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """Refuse, by name, fields of a `config.json` that ask for what the model cannot do."""
        for name, value in expected.items():
            if fields.get(name, value) != value:
                raise ConversionError(
                    f"{self.checkpoint.path}: config.json has {name} = {fields[name]!r}; only"
                    f" {value!r} is supported for a {self.table.description}"
                )


@dataclasses.dataclass(frozen=True)
class Step:
    """A row for one layer: full names of its tensors, and its leaves with their shapes."""

    row: Row
    layer: Mapping[str, int]
    sources: tuple[str, ...]
    targets: dict[str, Shape]

    def source_shapes(self) -> list[Shape]:
        return self.row.transform.source_shapes(list(self.targets.values()), len(self.sources))


@dataclasses.dataclass(frozen=True)
class ConversionJob:
    """A network of a checkpoint that fits its table, ready to convert."""

    source: Source
    cfg: Any
    steps: list[Step]

    def leaves(self, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """(path, array) of every leaf, holding the tensors of `prefetch.AHEAD` rows
        and one more.

        `dtype` None keeps what is stored; one of `QUANTIZED` quantizes the kernels of the
        stacks (see `quantize`), puts their scales behind them, and keeps the rest. Raises
        ConversionError if a tensor cannot be read or quantized, or if `dtype` cannot hold a
        number.
        """
        for step, tensors in prefetch.prefetch(self._read()):
            # numpy joins no float16 with bfloat16.
            tensors = [tensor.astype(self._dtype(step), copy=False) for tensor in tensors]
            made = step.row.transform(tensors, list(step.targets.values()))
            for path, array in zip(step.targets, made, strict=True):
                if dtype and self._is_quantized(path, dtype):
                    yield from zip(
                        _quantized_paths(path), arrays.quantize(path, array, dtype), strict=True
                    )
                else:
                    yield (
                        path,
                        arrays.contiguous(arrays.cast(path, array, self._target(step, dtype))),
                    )

    def _read(self) -> Iterator[tuple[Step, list[np.ndarray]]]:
        """Yield every step with its tensors."""
        mapped = 0
        for step in self.steps:
            tensors = [self.source.checkpoint.read(name) for name in step.sources]
            yield step, tensors
            mapped += sum(tensor.nbytes for tensor in tensors)
            if mapped >= MAPPED:
                release_pages(self.source.checkpoint.files)
                mapped = 0

    def paths(self, dtype: str | None = None) -> Iterator[str]:
        """Yield the paths of `leaves`, in the same order."""
        for path in (path for step in self.steps for path in step.targets):
            if self._is_quantized(path, dtype):
                yield from _quantized_paths(path)
            else:
                yield path

    def nbytes(self, dtype: str | None = None) -> int:
        """Return the bytes of all leaves."""
        return sum(
            math.prod(shape) + 4 * math.prod(shape[1:])
            if self._is_quantized(path, dtype)
            else math.prod(shape) * jnp.dtype(self._target(step, dtype)).itemsize
            for step in self.steps
            for path, shape in step.targets.items()
        )

    def _is_quantized(self, path: str, dtype: str | None) -> bool:
        stacks = registry.NETWORKS[self.source.table.kind].stacks
        in_a_stack = path.endswith("/kernel") and path.partition("/")[0] in stacks
        return dtype in quantization.QUANTIZED and in_a_stack

    def _target(self, step: Step, dtype: str | None) -> str:
        return self._dtype(step) if dtype in (None, *quantization.QUANTIZED) else dtype

    def _dtype(self, step: Step) -> str:
        """Return the narrowest type for all tensors of a step; without tensors, the type of most
        tensors in the checkpoint."""
        dtype = self.source.checkpoint.dtype
        if step.sources:
            return str(jnp.result_type(*map(dtype, step.sources)))
        names = [name for step in self.steps for name in step.sources]
        return Counter(map(dtype, names)).most_common(1)[0][0]


def make_job(source: Source) -> ConversionJob:
    """Match a checkpoint with its table. Raises one ConversionError with all problems, also if its
    sizes make no network."""
    cfg = source.table.config(source)
    try:
        registry.abstract_leaves(source.table.kind, cfg)
    except NO_NETWORK as error:
        line = first_line(error)
        raise ConversionError(
            f"{source.checkpoint.path}: its sizes make no {source.table.description}: {cfg}"
            f" ({line}); the file or its config.json is damaged, or of another model"
        ) from error
    steps = steps_of(source.table, cfg, source.prefix)
    if problems := _problems(source, cfg, steps):
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConversionError(
            f"{source.checkpoint.path} does not fit a {source.table.description}:\n{listed}"
        )
    return ConversionJob(source, cfg, steps)


def steps_of(table: Table, cfg: Any, prefix: str = "") -> list[Step]:
    """Return the steps that make all leaves of a model.

    Raises LookupError if the table has no row, or several rows, for a leaf.
    """
    patterns = [
        (row, part, _expression(target))
        for row in table.rows(cfg)
        for part, target in enumerate(row.targets)
    ]
    groups: dict[Any, tuple[Row, dict[str, int], dict[int, tuple[str, Shape]]]] = {}
    for path, leaf in registry.abstract_leaves(table.kind, cfg).items():
        found = [(row, part, m) for row, part, e in patterns if (m := e.fullmatch(path))]
        if len(found) != 1:
            raise LookupError(f"table of {table.description}: {len(found)} rows for {path}")
        row, part, match = found[0]
        layer = {name: int(number) for name, number in match.groupdict().items()}
        key = (row.targets, *layer.values())
        groups.setdefault(key, (row, layer, {}))[2][part] = (path, leaf.shape)
    return [
        Step(
            row,
            layer,
            tuple(prefix + name.format(**layer) for name in row.sources),
            dict(leaf for _, leaf in sorted(parts.items())),
        )
        for row, layer, parts in groups.values()
    ]


def _quantized_paths(path: str) -> tuple[str, str]:
    return path, path.removesuffix("kernel") + quantization.SCALE


def check_space(target: Path, needed: int, freed: int = 0) -> None:
    """Raise ConversionError if `needed` bytes do not fit on the filesystem of `target`, after its
    `freed` bytes of old content are removed."""
    folder = next(f for f in (target, *target.absolute().parents) if f.is_dir())
    free = shutil.disk_usage(folder).free + freed
    if needed > free:
        raise ConversionError(
            f"{target} needs {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there; make"
            " room, or write to another disk"
        )


def _problems(source: Source, cfg: Any, steps: list[Step]) -> list[str]:
    """Return one line for each kind of problem."""
    checkpoint = source.checkpoint
    # Dicts as sets that keep their order.
    gaps: dict[str, None] = {}
    missing: dict[str, None] = {}
    misshapen: dict[str, None] = {}
    types: dict[str, None] = {}
    modules = _modules(checkpoint.names())
    for step in steps:
        pairs = zip(step.row.sources, step.sources, step.source_shapes(), strict=True)
        for pattern, name, shape in pairs:
            if name in checkpoint:
                if checkpoint.shape(name) != shape:
                    misshapen[f"{name} is {checkpoint.shape(name)}, expected {shape}"] = None
                if checkpoint.dtype(name) not in DTYPES:
                    types[f"{name} is {checkpoint.dtype(name)}"] = None
                continue
            layer = _layer_of(source.prefix + pattern, step.layer)
            if layer and layer not in modules:
                gaps[layer] = None
            else:
                missing[name] = None
    allowed = re.compile("|".join(source.table.ignored_keys(cfg)) or "(?!)")
    used = {name for step in steps for name in step.sources}
    unknown = [
        name
        for name in source.names()
        if name not in used and not allowed.search(name.removeprefix(source.prefix))
    ]
    return [
        *_listed("layers absent", gaps),
        *_listed("tensors missing", missing),
        *_listed("tensors of another shape", misshapen),
        *_listed(f"tensors of a type other than {', '.join(DTYPES)}", types),
        *_listed("tensors that the model has no place for", unknown),
    ]


def _modules(names: Iterable[str]) -> set[str]:
    """ "blocks.7.norm.weight" -> blocks, blocks.7, blocks.7.norm."""
    return {name[: dot.start()] for name in names for dot in re.finditer(r"\.", name)}


def _layer_of(pattern: str, layer: Mapping[str, int]) -> str | None:
    """Return the name of a layer: "blocks.{i}.norm.weight" -> "blocks.7"; None without layers."""
    head, number, _ = pattern.partition("{i}")
    return f"{head}{layer['i']}" if number else None


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    return [f"{what} ({len(names)}): {shorten(names)}"]


def _expression(pattern: str) -> re.Pattern[str]:
    """ "double/{i}/mod" -> an expression whose group `i` is the number."""
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(pattern)))
