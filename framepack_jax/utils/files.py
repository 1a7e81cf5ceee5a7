"""Files that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write to that becomes `path` at the end, or disappears on an error."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.part")
    try:
        yield partial
        # The data before the name: after a power cut too, the file is whole or the old one.
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
