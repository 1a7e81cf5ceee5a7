"""A table of rows, matched against a checkpoint and a model.

`plan` pairs every leaf of the model with the tensors that it is made of, and finds everything that
is wrong - absent layers, missing tensors, wrong shapes, unknown tensors - before a byte is written.
`Plan.leaves` then makes the leaves one after another.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from framepack_jax.conversion.readers import Checkpoint, ConversionError
from framepack_jax.conversion.transforms import Row, Shape
from framepack_jax.models import kinds

DTYPES = ("float32", "bfloat16", "float16")
SHOWN = 4


def _no_leftovers(cfg: Any) -> tuple[str, ...]:
    return ()


@dataclasses.dataclass(frozen=True)
class Table:
    """One naming of one kind of network.

    A checkpoint that holds the tensor `landmark`, behind one of `prefixes`, is in this naming.
    `config` reads the model's Config off a `Source`, `rows` are those for a config, and `leftovers`
    are regular expressions of names that may stay unused.
    """

    kind: str
    what: str
    landmark: str
    rows: Callable[[Any], list[Row]]
    config: Callable[["Source"], Any]
    prefixes: tuple[str, ...] = ("",)
    leftovers: Callable[[Any], tuple[str, ...]] = _no_leftovers

    def prefix_in(self, checkpoint: Checkpoint) -> str | None:
        """The prefix of this naming in a checkpoint, None where it is in another naming."""
        return next((p for p in self.prefixes if p + self.landmark in checkpoint), None)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint read by a table; names are without prefix. `given` holds Config fields that a
    person supplies because the checkpoint may not tell them."""

    checkpoint: Checkpoint
    table: Table
    prefix: str = ""
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def has(self, name: str) -> bool:
        return self.prefix + name in self.checkpoint

    def shape(self, pattern: str) -> Shape:
        """Shape of a tensor, of any layer where the pattern has `{i}`. Raises ConversionError."""
        for name in self._matches(pattern):
            return self.checkpoint.shape(name.string)
        raise ConversionError(
            f"{self.checkpoint.path}: there is no tensor {self.prefix}{pattern}, which tells the"
            f" sizes of a {self.table.what}; is the file whole?"
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
                    f" {value!r} is supported for a {self.table.what}"
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
class Plan:
    """A conversion that is known to fit."""

    source: Source
    cfg: Any
    steps: list[Step]

    def leaves(self, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """(path, array) of every leaf, holding one row's tensors at a time; `dtype` None keeps what
        is stored."""
        for step in self.steps:
            tensors = [self.source.checkpoint.read(name) for name in step.sources]
            arrays = step.row.transform(tensors, list(step.targets.values()))
            for path, array in zip(step.targets, arrays, strict=True):
                yield path, np.ascontiguousarray(array, jnp.dtype(dtype or self._dtype(step)))

    def nbytes(self, dtype: str | None = None) -> int:
        """Bytes of all leaves."""
        return sum(
            sum(map(int, map(np.prod, step.targets.values())))
            * jnp.dtype(dtype or self._dtype(step)).itemsize
            for step in self.steps
        )

    def _dtype(self, step: Step) -> str:
        """Leaves without a tensor take the dtype that most tensors have."""
        names = step.sources or [name for step in self.steps for name in step.sources]
        return Counter(map(self.source.checkpoint.dtype, names)).most_common(1)[0][0]


def plan(source: Source) -> Plan:
    """Match a checkpoint. Raises one ConversionError with everything that does not fit."""
    cfg = source.table.config(source)
    steps = _steps(source, cfg)
    if problems := _problems(source, cfg, steps):
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConversionError(
            f"{source.checkpoint.path} does not fit a {source.table.what}:\n{listed}"
        )
    return Plan(source, cfg, steps)


def _steps(source: Source, cfg: Any) -> list[Step]:
    """Every leaf of the model with the one row that it belongs to."""
    patterns = [
        (row, part, _expression(target))
        for row in source.table.rows(cfg)
        for part, target in enumerate(row.targets)
    ]
    groups: dict[Any, tuple[Row, dict[str, int], dict[int, tuple[str, Shape]]]] = {}
    for path, leaf in kinds.abstract_leaves(source.table.kind, cfg).items():
        found = [(row, part, m) for row, part, e in patterns if (m := e.fullmatch(path))]
        if len(found) != 1:
            raise LookupError(f"table of {source.table.what}: {len(found)} rows for {path}")
        row, part, match = found[0]
        layer = {name: int(number) for name, number in match.groupdict().items()}
        key = (row.targets, *layer.values())
        groups.setdefault(key, (row, layer, {}))[2][part] = (path, leaf.shape)
    return [
        Step(
            row,
            layer,
            tuple(source.prefix + name.format(**layer) for name in row.sources),
            dict(leaf for _, leaf in sorted(parts.items())),
        )
        for row, layer, parts in groups.values()
    ]


def _problems(source: Source, cfg: Any, steps: list[Step]) -> list[str]:
    """One line for each sort of problem."""
    checkpoint = source.checkpoint
    gaps, missing, misshapen, types = {}, {}, {}, {}
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
            absent = layer and not any(n.startswith(f"{layer}.") for n in checkpoint.names())
            (gaps if absent else missing)[layer if absent else name] = None
    allowed = re.compile("|".join(source.table.leftovers(cfg)) or "(?!)")
    used = {name for step in steps for name in step.sources}
    unknown = [n for n in checkpoint.names() if n not in used and not allowed.search(n)]
    return [
        *_listed("layers absent", gaps),
        *_listed("tensors missing", missing),
        *_listed("tensors of another shape", misshapen),
        *_listed(f"tensors of a type other than {', '.join(DTYPES)}", types),
        *_listed("tensors that the model has no place for", unknown),
    ]


def _layer_of(pattern: str, layer: Mapping[str, int]) -> str | None:
    """ "blocks.{i}.norm.weight" -> "blocks.7", None where there are no layers."""
    head, number, _ = pattern.partition("{i}")
    return f"{head}{layer['i']}" if number else None


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    rest = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{what} ({len(names)}): {', '.join([*names[:SHOWN], *rest])}"]


def _expression(pattern: str) -> re.Pattern[str]:
    """ "double/{i}/mod" -> an expression whose group `i` is the number."""
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(pattern)))
