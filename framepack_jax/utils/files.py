"""Write files atomically: a reader finds the whole new file, the old one, or none."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from framepack_jax.utils.paths import is_remote, store_errors
from framepack_jax.utils.write_errors import write_errors


@contextlib.contextmanager
def atomic_write(path: epath.PathLike) -> Iterator[Path]:
    """Yield a local path to write to; it becomes `path` at the end, and is removed on an error."""
    with partial_file(path) as partial:
        yield partial
        publish(partial, path)


@contextlib.contextmanager
def partial_file(path: epath.PathLike) -> Iterator[Path]:
    """Yield a local path to write to, which `publish` can move to `path` or a file beside it; it is
    removed at the end."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / epath.Path(path).name
        return
    target = Path(path)
    partial = target.with_name(f"{target.name}.part")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, path: epath.PathLike) -> None:
    """Make a written file `path`. An object of an object store appears whole. Raises OSError."""
    if is_remote(path):
        with (
            store_errors(path),
            open(partial, "rb") as source,
            epath.Path(path).open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 24)
        return
    # Data before the name: after a power cut, the file is the whole new one or the old one.
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def local_copy(path: epath.PathLike) -> Iterator[Path]:
    """Yield a file on a disk with the content of `path`: the file itself, or a temporary copy of an
    object, for libraries that know no object stores. Raises FileNotFoundError for a missing object.
    """
    if not is_remote(path):
        yield Path(path)
        return
    source = epath.Path(path)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / source.name
        with source.open("rb") as data, open(target, "wb") as copy:
            shutil.copyfileobj(data, copy, 1 << 24)
        yield target


def atomic_write_text(path: epath.PathLike, text: str) -> None:
    """Write a text file atomically, on a disk or in an object store. Raises WriteError, which names
    the file or its temporary copy."""
    with write_errors(path), atomic_write(path) as partial, write_errors(partial):
        partial.write_text(text)
