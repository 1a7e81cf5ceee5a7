"""Paths on a disk and in an object store: what a flag takes is checked before a command starts.

    output: Annotated[epath.Path, IN_STORES]      a path flag that also takes gs://
    folder: Annotated[epath.Path, FILES_IN_STORES]      and s3://

Every other flag takes paths on a disk only.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Iterator

from etils import epath

from framepack_jax.utils.messages import first_line

# A `pathlib.Path` has one slash behind the scheme.
SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?=[^/]|$)")
# Scheme -> (module that reads and writes it, extra of framepack-jax that installs the module).
STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Packages whose errors are those of a store.
CLIENTS = ("gcsfs", "google", "aiohttp", "s3fs", "botocore", "aiobotocore", "requests")
ON_DISK = (
    "expected a path on a disk; copy the files to a disk, or mount the bucket, for example with"
    " Cloud Storage FUSE"
)


@dataclasses.dataclass(frozen=True)
class Stores:
    """Mark of a flag whose path may lie in object stores of these schemes."""

    schemes: tuple[str, ...]


FILES_IN_STORES = Stores(("gs", "s3"))
# Arrays are written and read by Orbax, which knows no other object store.
IN_STORES = Stores(("gs",))


def _list_anew() -> None:
    """Let clients of fsspec ask the store for each listing, since other hosts write there too."""
    for scheme in STORES:
        # fsspec reads this when it is imported, which takes 0.1 s.
        os.environ.setdefault(f"FSSPEC_{scheme.upper()}", '{"use_listings_cache": false}')
        if config := sys.modules.get("fsspec.config"):
            config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


_list_anew()


def is_remote(path: epath.PathLike) -> bool:
    """Return whether a path lies in an object store."""
    return "://" in os.fspath(path)


def is_store_error(error: Exception) -> bool:
    """Return whether a client of an object store has raised an error."""
    return type(error).__module__.partition(".")[0] in CLIENTS


def explain_store_error(error: Exception) -> str:
    """Return one line on an error of a client of an object store."""
    return (
        f"the object store cannot be used ({first_line(error)}); check the network, and the"
        " credentials: gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS"
    )


@contextlib.contextmanager
def store_errors(path: epath.PathLike) -> Iterator[None]:
    """Raise OSError that names a path for the errors of the client of an object store, which are of
    many types."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{os.fspath(path)}: {first_line(error)}") from error


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
        raise ValueError(
            f"{flag} {text}: expected a path on a disk, or {known}; mount the bucket, or copy the"
            " files"
        )
    if match.end() == len(text):
        raise ValueError(f"{flag} {text}: expected {scheme}://BUCKET/FOLDER")
    module, extra = STORES[scheme]
    if importlib.util.find_spec(module) is None:
        raise ValueError(f'{flag} {text} needs {module}: pip install "framepack-jax[{extra}]"')
