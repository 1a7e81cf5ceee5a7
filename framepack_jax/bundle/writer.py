"""Write the parameters of a network into a bundle, a few leaves at a time."""

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from orbax.checkpoint.experimental import v1 as ocp

from framepack_jax.bundle import contexts
from framepack_jax.bundle.hashes import add_leaf
from framepack_jax.bundle.manifest import absolute
from framepack_jax.utils import storage
from framepack_jax.utils.prefetch import prefetch

# Bytes of one partial save; each save lists all leaves that are saved already.
WRITE_CHUNK = 1 << 29


class Written(NamedTuple):
    """Size of a network's parameters, and SHA-256 over their names, types, shapes and values."""

    bytes: int
    sha256: str


def write_params(path: epath.PathLike, leaves: Iterable[tuple[str, np.ndarray]]) -> Written:
    """Write (leaf path, array) pairs as one checkpoint, a few at a time.

    The next leaves are made while earlier ones are hashed and written. Memory holds about twice
    `WRITE_CHUNK` bytes of arrays and `AHEAD` leaves. The checkpoint appears at `path` when it is
    complete. In an object store and on its mount, where a folder cannot be renamed, it is copied
    there from a temporary folder.
    """
    path = absolute(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if storage.renames_folders(path.parent):
        return _write(path, leaves)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        written = _write(epath.Path(local), leaves)
        if path.exists():
            path.rmtree()
        storage.copy_tree(local, path)
    return written


def _write(path: epath.Path, leaves: Iterable[tuple[str, np.ndarray]]) -> Written:
    """Write a checkpoint where folders can be renamed."""
    partial = path.parent / f"{path.name}.partial_save"
    for leftover in (path, partial):
        if leftover.exists():
            leftover.rmtree()
    written, held, size, digest = 0, {}, 0, hashlib.sha256()
    with contexts.writing():
        writing = None
        try:
            for name, array in prefetch(leaves):
                array = np.ascontiguousarray(array)
                add_leaf(digest, name, array)
                held[tuple(name.split("/"))] = array.view(_Settled)
                size += array.nbytes
                if size >= WRITE_CHUNK:
                    _finish(writing)
                    writing = ocp.partial.save_async(path, unflatten_dict(held))
                    written, held, size = written + size, {}, 0
        finally:
            # Also if making a leaf failed: a retry must not collide with this write.
            _finish(writing)
        if held:
            ocp.partial.save(path, unflatten_dict(held))
        ocp.partial.finalize(path)
    return Written(written + size, digest.hexdigest())


class _Settled(np.ndarray):
    """An array that no longer changes, which orbax therefore need not copy before writing.

    numpy copies bfloat16 more slowly than the disk writes it.
    """

    def __deepcopy__(self, memo: Any) -> "_Settled":
        return self


def _finish(writing: Any) -> None:
    if writing is not None:
        writing.result()
