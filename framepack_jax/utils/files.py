"""Write files atomically: a reader finds the whole new file, the old one, or none."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from etils import epath


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` at the end, and is removed on an error."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.part")
    try:
        yield partial
        # Data before the name: after a power cut, the file is the whole new one or the old one.
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write_text(path: epath.PathLike, text: str) -> None:
    """Write a text file atomically, on a disk or in an object store."""
    if "://" not in str(path):
        with atomic_write(path) as partial:
            partial.write_text(text)
        return
    target = epath.Path(path)
    partial_object = target.parent / f"{target.name}.part"
    partial_object.write_text(text)
    partial_object.replace(target)
