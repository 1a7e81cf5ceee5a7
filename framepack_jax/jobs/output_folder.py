"""The default output folder: a new one under outputs/ for each command."""

import contextlib
import datetime
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from framepack_jax.parallel.multihost import is_primary, on_primary


@contextlib.contextmanager
def new_output_folder(source: Path | None) -> Iterator[Path]:
    """Yield a new folder under outputs/, named by the time and the `source` file of the video; it
    is removed at the end if it stayed empty."""
    folder = on_primary(make_output_folder, source)
    try:
        yield folder
    finally:
        if is_primary():
            with contextlib.suppress(OSError):
                folder.rmdir()


def make_output_folder(source: Path | None) -> Path:
    """Make a folder under outputs/ that no other process uses. Raises OSError."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    # Image tools name files by their prompts; a file name has at most 255 bytes.
    stem = os.fsencode(source.stem)[:100].decode(errors="ignore") if source else "text"
    name, outputs = f"{stamp}_{stem}", Path("outputs")
    try:
        outputs.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise OSError(f"{outputs} is a file or a broken link; give --output") from error
    for number in itertools.count(1):
        folder = outputs / f"{name if number == 1 else f'{name}_{number}'}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError
