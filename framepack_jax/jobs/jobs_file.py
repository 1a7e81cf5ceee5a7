"""A jobs file: one JSON object per line with the options of a video."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from framepack_jax.jobs.spec import SPEC_FIELDS, VideoSpec
from framepack_jax.utils import fields
from framepack_jax.utils.flags import check_text, tidied


def read_jobs(
    path: Path, base: dict[str, Any], output: epath.Path
) -> Iterator[tuple[epath.Path, VideoSpec | ValueError]]:
    """Yield the folder and the options of each line, which replace those in `base`.

    A line that cannot be read yields its error, so that the other videos are still sampled. Raises
    ValueError if the file holds no lines of text.
    """
    try:
        # str.splitlines would also split at separators that JSON allows inside a string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"jobs {path}: expected lines of JSON in UTF-8 ({error})") from error
    if not any(map(str.strip, lines)):
        raise ValueError(f"jobs {path}: it is empty; give a JSON object a line")
    names: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _job(f"{path}, line {number}", line, base, output, f"job_{number:04d}", names)


def _job(
    where: str, line: str, base: dict[str, Any], output: epath.Path, default: str, names: set[str]
) -> tuple[epath.Path, VideoSpec | ValueError]:
    """Parse a line; `names` are those of earlier lines, to which this one's is added."""
    folder = output / default
    try:
        job = json.loads(line, object_pairs_hook=unique_keys)
        if not isinstance(job, dict):
            raise ValueError("expected a JSON object")
        name = job.pop("name", default)
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"name {name!r}: expected the name of a folder")
        check_text("name", name)
        folder = output / name
        if name in names:
            raise ValueError(f"name {name!r} is used by an earlier line")
        names.add(name)
        return folder, VideoSpec(**base | {k: _typed(k, v) for k, v in job.items()})
    except (ValueError, OverflowError, RecursionError) as error:
        return folder, ValueError(f"{where}: {error}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError if a key is given twice."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is given twice")
    return dict(pairs)


def _typed(name: str, value: Any) -> Any:
    """Convert a JSON value to the type of its option. Raises ValueError."""
    if name not in SPEC_FIELDS:
        raise ValueError(f"{name!r} is not a flag of a video; known are {', '.join(SPEC_FIELDS)}")
    value = tidied(name, tuple(value) if isinstance(value, list) else value)
    return fields.convert(VideoSpec, {name: value})[name]
