"""The folder of a new bundle: refuse to overwrite other files, check space, remove old parts."""

import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from etils import epath

from framepack_jax import bundle
from framepack_jax.conversion import engine, tokenizers
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.utils.paths import is_remote


def check_replaceable(output: epath.Path, *, overwrite: bool) -> None:
    """Raise ConversionError unless a folder is absent, empty, an unfinished bundle, or with
    `overwrite` a bundle."""
    stopped = (output / bundle.UNFINISHED).exists()
    finished = (output / bundle.MANIFEST).exists() and not stopped
    if finished and not overwrite:
        raise ConversionError(
            f"{output} holds a bundle; choose another --output, or replace it with --overwrite"
        )
    ours = finished or stopped or not output.exists()
    if not ours and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} is not a bundle and not empty; choose another --output")


def check_outside(output: str, sources: Iterable[Path]) -> None:
    """Raise ConversionError if a source lies in the folder that will be replaced."""
    if is_remote(output):
        return
    for path in sources:
        if path.resolve().is_relative_to(Path(output).resolve()):
            raise ConversionError(f"{path} lies in {output}, which would be replaced")


def check_reference(output: str, encoders_from: str) -> None:
    """Raise ConversionError if a bundle in an object store would refer to networks on a disk."""
    if is_remote(output) and not is_remote(encoders_from):
        raise ConversionError(
            f"--encoders-from {encoders_from} lies on a disk, and a bundle in {output} cannot refer"
            " to its networks; copy it into the object store first"
        )


def check_space(output: str, sizes: Sequence[int]) -> None:
    """Raise ConversionError if networks of these bytes do not fit; an object store has no limit,
    but networks pass through the temporary folder, one by one."""
    if is_remote(output):
        engine.check_space(Path(tempfile.gettempdir()), max(sizes, default=0))
        return
    # An earlier bundle in the folder is removed before the first byte is written.
    old = [f for part in _parts(epath.Path(output)) for f in Path(part).rglob("*") if f.is_file()]
    engine.check_space(Path(output), sum(sizes), sum(file.stat().st_size for file in old))


def clear(output: epath.Path) -> None:
    """Make the folder, mark it as unfinished, and remove an old bundle, its manifest first."""
    output.mkdir(parents=True, exist_ok=True)
    (output / bundle.UNFINISHED).write_text("framepack convert did not finish; run it again\n")
    (output / bundle.MANIFEST).unlink(missing_ok=True)
    for part in _parts(output):
        part.rmtree()


def _parts(output: epath.Path) -> list[epath.Path]:
    """Return the folders of a bundle, and those that an interrupted run left (`role.partial_save`
    and orbax's suffixes)."""
    if not output.exists():
        return []
    names = "|".join((*bundle.ROLES, *tokenizers.MARKERS))
    pattern = re.compile(rf"({names})(\.partial_save.*)?")
    return [part for part in output.iterdir() if pattern.fullmatch(part.name)]
