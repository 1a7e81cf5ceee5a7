"""Write the parameters of a network into a bundle, a few leaves at a time."""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from orbax.checkpoint.experimental import v1 as ocp

from framepack_jax.bundle.manifest import absolute
from framepack_jax.utils.prefetch import prefetch

# Bytes of one partial save: each looks through all leaves that are there already.
WRITE_CHUNK = 1 << 29


class Written(NamedTuple):
    """Size and hash of a network's parameters: SHA-256 over names, types, shapes and values."""

    bytes: int
    sha256: str


def write_params(path: epath.PathLike, leaves: Iterable[tuple[str, np.ndarray]]) -> Written:
    """Write (leaf path, array) pairs as one checkpoint, a few at a time.

    Leaves are made while the ones before are hashed and written; about twice `WRITE_CHUNK` bytes of
    arrays, and `AHEAD` leaves, are held. The checkpoint appears at `path` when all is written, and
    never half.
    """
    path = absolute(path)
    partial = path.parent / f"{path.name}.partial_save"
    for leftover in (path, partial):
        if leftover.exists():
            leftover.rmtree()
    path.parent.mkdir(parents=True, exist_ok=True)
    written, held, size, digest = 0, {}, 0, hashlib.sha256()
    with _uncompressed():
        writing = None
        try:
            for name, array in prefetch(leaves):
                array = np.ascontiguousarray(array)
                digest.update(f"{name} {array.dtype} {array.shape} ".encode())
                digest.update(array.reshape(-1).view(np.uint8).data)
                held[tuple(name.split("/"))] = array.view(_Settled)
                size += array.nbytes
                if size >= WRITE_CHUNK:
                    _finish(writing)
                    writing = ocp.partial.save_async(path, unflatten_dict(held))
                    written, held, size = written + size, {}, 0
        finally:
            # Also where making leaves failed: a later attempt must not meet this one's writing.
            _finish(writing)
        if held:
            ocp.partial.save(path, unflatten_dict(held))
        ocp.partial.finalize(path)
    return Written(written + size, digest.hexdigest())


class _Settled(np.ndarray):
    """An array that nobody changes any more: orbax need not copy it before it writes, for which
    numpy would take longer than the disk, bfloat16 being new to it."""

    def __deepcopy__(self, memo: Any) -> "_Settled":
        return self


def _finish(writing: Any) -> None:
    if writing is not None:
        writing.result()


def _uncompressed() -> ocp.Context:
    """Weights hardly shrink, and compression takes three times as long as writing them."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context
