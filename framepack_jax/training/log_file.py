"""The log of a run: log.jsonl, one JSON object a line.

In an object store, where no file can be appended to, a run that is under way has parts, one for
each of its lives and each `PART_BYTES`:

    RUN/log.jsonl              the lines of lives that ended by themselves
    RUN/log/000000500.jsonl    the lines after step 500; earlier files count up to step 500
"""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from etils import epath

from framepack_jax.utils.files import atomic_write_text
from framepack_jax.utils.uploads import Uploads
from framepack_jax.utils.write_errors import write_errors

LOG, PARTS = "log.jsonl", "log"
PART_BYTES = 1 << 20


def read_lines(run: epath.PathLike) -> list[str]:
    """Return the lines of the log of all lives of a run. Incomplete lines are left out."""
    run = epath.Path(run)
    file = run / LOG
    lines = _until(file.read_text().splitlines()) if file.exists() else []
    for start, part in _parts(run):
        lines = [*_until(lines, start), *_until(part.read_text().splitlines())]
    return lines


def _until(lines: Iterable[str], step: float = float("inf")) -> list[str]:
    """Return the complete lines up to a step."""
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            kept += [line] if json.loads(line)["step"] <= step else []
    return kept


def _parts(run: epath.Path) -> list[tuple[int, epath.Path]]:
    """Return (step after which it begins, file) of each part, in order."""
    if not (run / PARTS).exists():
        return []
    files = [file for file in (run / PARTS).iterdir() if file.name.endswith(".jsonl")]
    return sorted((int(file.stem), file) for file in files if file.stem.isdigit())


class LogFile:
    """Append lines to log.jsonl. Removes lines after `step`, which an earlier process wrote after
    its last checkpoint."""

    def __init__(self, run: Path, step: int) -> None:
        if (run / LOG).exists():
            lines = _until((run / LOG).read_text().splitlines(), step)
            atomic_write_text(run / LOG, "".join(f"{line}\n" for line in lines))
        self.file = (run / LOG).open("a")

    def write(self, step: int, line: dict[str, Any]) -> None:
        """Write the line of a step."""
        with write_errors(self.file.name):
            self.file.write(json.dumps({"step": step, **line}) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        with write_errors(self.file.name):
            self.file.close()


class LogParts:
    """Write the lines after `step` to parts, which `uploads` copies to the run. Removes parts of
    an earlier process that begin later."""

    def __init__(self, run: epath.Path, uploads: Uploads, step: int) -> None:
        for start, part in _parts(run):
            if start > step:
                part.unlink()
        self.folder = uploads.folder / PARTS
        self.folder.mkdir()
        self._open(step)

    def _open(self, step: int) -> None:
        self.last = step
        self.file = (self.folder / f"{step:09d}.jsonl").open("a")

    def write(self, step: int, line: dict[str, Any]) -> None:
        """Write the line of a step."""
        with write_errors(self.file.name):
            if self.file.tell() >= PART_BYTES and step > self.last:
                self.file.close()
                self._open(self.last)
            self.file.write(json.dumps({"step": step, **line}) + "\n")
            self.file.flush()
        self.last = step

    def close(self) -> None:
        """Close the part."""
        with write_errors(self.file.name):
            self.file.close()


def join(run: epath.Path) -> None:
    """Join the parts of a run to log.jsonl."""
    if parts := _parts(run):
        atomic_write_text(run / LOG, "".join(f"{line}\n" for line in read_lines(run)))
        for _, part in parts:
            part.unlink()
