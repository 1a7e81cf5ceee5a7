"""Folders on disks, on mounts of object stores, and in object stores."""

import ctypes
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from framepack_jax.utils.paths import is_remote, store_errors

FUSE_SUPER_MAGIC = 0x65735546


def renames_folders(folder: epath.PathLike) -> bool:
    """Return whether an existing folder lies on a file system that renames folders atomically.

    Object stores do not, nor do their mounts (FUSE), which refuse it or copy file by file.
    """
    return not is_remote(folder) and not is_fuse(folder) and _renamed(Path(folder))


def is_fuse(path: epath.PathLike) -> bool:
    """Return whether an existing path lies on a FUSE mount, by `statfs`."""
    if sys.platform != "linux":
        return False
    # The first field of the structure, which has 120 bytes, is a word with the type.
    found = ctypes.create_string_buffer(512)
    failed = ctypes.CDLL(None).statfs(os.fsencode(path), found)
    return not failed and ctypes.c_long.from_buffer(found).value & 0xFFFFFFFF == FUSE_SUPER_MAGIC


def _renamed(folder: Path) -> bool:
    """Return whether a folder that is not empty could be renamed."""
    probe = Path(tempfile.mkdtemp(prefix=".rename-", dir=folder))
    try:
        (probe / "a" / "b").mkdir(parents=True)
        (probe / "a").rename(probe / "c")
    except OSError:
        return False
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    return True


def copy_tree(source: Path, target: epath.PathLike) -> None:
    """Copy the files of a local folder into a folder of any kind."""
    if not is_remote(target):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    store, path = _open_store(target)
    store.put(f"{source}/", f"{path}/", recursive=True)


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Move a folder to a place in the same store; where folders cannot be renamed, copy its files
    first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(source):
        store, path = _open_store(source)
        store.copy(f"{path}/", f"{_open_store(target)[1]}/", recursive=True)
        source.rmtree()
        return
    try:
        source.rename(target)
    except OSError:
        shutil.copytree(source, target)
        source.rmtree()


def read_range(path: epath.PathLike, begin: int, end: int) -> bytes:
    """Read some bytes of an object. Raises OSError."""
    store, name = _open_store(path)
    with store_errors(path):
        return store.cat_file(name, start=begin, end=end)


def _open_store(path: epath.PathLike) -> tuple[Any, str]:
    """Return the client of an object store, and the name of a path there."""
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(path))
