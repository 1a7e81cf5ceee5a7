"""Models under test: a bundle with a schedule and settings of the sampler, each under a name.

A file of rows has one JSON object a line. Its keys are those of `RowSpec` and of `Settings`:

    {"name": "inverted, 50 steps", "schedule": "f1k1_x_g9_f1k1f2k2f16k4_td", "steps": 50}
    {"name": "repeated image-to-video", "bundle": "weights/f1", "repeated": true}
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framepack_jax import bundle, packing
from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.jobs.jobs_file import unique_keys
from framepack_jax.toy import results, suites
from framepack_jax.toy.suites import Model
from framepack_jax.utils import fields


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """A row to evaluate.

    Args:
        bundle: folder or name of a bundle.
        name: name in the tables; default: the bundle's, with the schedule if one is given.
        schedule: replaces the bundle's.
        settings: settings of the sampler.
        repeated: generate each section from the last frame of the previous one as its image,
            without history.
    """

    bundle: str
    name: str = ""
    schedule: packing.Schedule | None = None
    settings: Settings = dataclasses.field(default_factory=Settings)
    repeated: bool = False

    @property
    def label(self) -> str:
        """Name in the tables."""
        if self.name:
            return self.name
        short = Path(self.bundle).name
        return short if self.schedule is None else f"{short} {self.schedule}"


@dataclasses.dataclass(frozen=True)
class _Line:
    """Keys of a line beside those of `Settings`."""

    bundle: str | None = None
    name: str = ""
    schedule: str | None = None
    repeated: bool = False


def of_flags(
    bundles: Sequence[str], schedules: Sequence[str], settings: Settings
) -> tuple[RowSpec, ...]:
    """Return a row for each bundle with each schedule. Raises ScheduleError."""
    parsed: list[packing.Schedule | None] = [packing.parse(text) for text in schedules]
    return tuple(
        RowSpec(name, "", schedule, settings)
        for name, schedule in itertools.product(bundles, parsed or [None])
    )


def read(
    file: Path, bundles: Sequence[str], schedules: Sequence[str], settings: Settings
) -> tuple[RowSpec, ...]:
    """Read a file of rows; one bundle, one schedule and settings are the defaults of its lines.

    Raises ValueError that names the line.
    """
    if len(bundles) > 1 or len(schedules) > 1:
        raise ValueError("--rows: give --bundle and --schedule at most once, for rows without one")
    default = _Line(next(iter(bundles), None), "", next(iter(schedules), None))
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--rows {file} cannot be read ({error})") from error
    rows: dict[str, RowSpec] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _row(json.loads(line, object_pairs_hook=unique_keys), default, settings)
            place = results.file_name(row.label)
            if place in rows:
                raise ValueError(
                    f"another row is called {rows[place].label}, and {row.label} has the same"
                    " folder; give it a name of its own"
                )
            if not place.strip(".") or "|" in row.label:
                raise ValueError(f"name {row.label!r}: expected letters or digits, and no |")
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        rows[place] = row
    if not rows:
        raise ValueError(f"--rows {file} is empty; give a JSON object a line")
    return tuple(rows.values())


def open_models(rows: Sequence[RowSpec], dtype: str | None) -> list[Model]:
    """Open the bundle of every row, without weights. Raises BundleError, ScheduleError, ValueError
    that names the row."""
    names = [row.label for row in rows]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"--bundle: two bundles are called {twice}; rename a folder, as tables use these names"
        )
    if taken := set(names) & set(suites.REFERENCES):
        raise ValueError(
            f"--bundle {taken.pop()}: a reference row has that name; rename the folder"
        )
    return [open_row(row, dtype) for row in rows]


def _row(values: Any, default: _Line, settings: Settings) -> RowSpec:
    """Return the row of a JSON object. Raises ValueError."""
    if not isinstance(values, Mapping):
        raise ValueError("expected a JSON object")
    own, others = (tuple(f.name for f in dataclasses.fields(kind)) for kind in (_Line, Settings))
    if unknown := [name for name in values if name not in (*own, *others)]:
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join((*own, *others))}")
    given = fields.convert(_Line, {name: values[name] for name in own if name in values})
    line = dataclasses.replace(default, **given)
    if line.bundle is None:
        raise ValueError("its bundle is missing; name one in the line, or give --bundle")
    changed = fields.convert(Settings, {name: values[name] for name in others if name in values})
    return RowSpec(
        os.path.expanduser(line.bundle),
        line.name,
        None if line.schedule is None else packing.parse(line.schedule),
        dataclasses.replace(settings, **changed),
        line.repeated,
    )


def open_row(row: RowSpec, dtype: str | None) -> Model:
    """Open the bundle of a row, without weights. Raises BundleError, ScheduleError, ValueError."""
    path = bundle.resolve(row.bundle)
    bundle.check_present(path)
    pipe = FramePack.open(path, dtype=dtype, schedule=row.schedule)
    row.settings.check(pipe.transformer.spec, pipe.sampling, pipe.schedule)
    return Model(row.label, path, pipe, row.settings, row.repeated)
