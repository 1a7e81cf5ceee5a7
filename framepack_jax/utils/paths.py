"""Paths on a disk and in an object store: what a flag takes is checked before a command starts.

    output: Annotated[epath.Path, IN_STORES]      a path flag that also takes gs://

Every other flag takes paths on a disk only.
"""

import dataclasses
import importlib.util
import os
import re

from etils import epath

# A `pathlib.Path` has one slash behind the scheme.
SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?=[^/]|$)")
# Scheme -> (module that reads and writes it, extra of framepack-jax that installs the module).
STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
ON_DISK = (
    "expected a path on a disk; copy the files to a disk, or mount the bucket, for example with"
    " Cloud Storage FUSE"
)


@dataclasses.dataclass(frozen=True)
class Stores:
    """Mark of a flag whose path may lie in object stores of these schemes."""

    schemes: tuple[str, ...]


# Arrays are written and read by Orbax, which knows no other object store.
IN_STORES = Stores(("gs",))


def is_remote(path: epath.PathLike) -> bool:
    """Return whether a path lies in an object store."""
    return "://" in os.fspath(path)


def check_place(flag: str, path: epath.PathLike, stores: Stores | None = None) -> None:
    """Raise ValueError if a flag does not take a path in an object store, or if the package that
    reads it is missing. `stores` is the mark of the flag."""
    text = os.fspath(path)
    match = SCHEME.match(text)
    if match is None:
        return
    scheme = match["scheme"]
    if "://" not in text:
        text = text.replace(":/", "://", 1)
    if stores is None:
        raise ValueError(f"{flag} {text}: {ON_DISK}")
    if scheme not in stores.schemes:
        known = " or ".join(f"{name}://" for name in stores.schemes)
        raise ValueError(f"{flag} {text}: expected a path on a disk, or {known}")
    if match.end() == len(text):
        raise ValueError(f"{flag} {text}: expected {scheme}://BUCKET/FOLDER")
    module, extra = STORES[scheme]
    if importlib.util.find_spec(module) is None:
        raise ValueError(f'{flag} {text} needs {module}: pip install "framepack-jax[{extra}]"')
