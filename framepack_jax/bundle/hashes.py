"""SHA-256 over the parameters of a network: their names, types, shapes and values."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from framepack_jax.bundle.loader import read_leaves, stored_dtypes
from framepack_jax.bundle.manifest import Manifest, role_config
from framepack_jax.models import registry
from framepack_jax.models.quantization import SCALE


def add_leaf(digest: Any, name: str, array: np.ndarray) -> None:
    """Add a contiguous array and its path to a hash."""
    digest.update(f"{name} {array.dtype} {array.shape} ".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)


def stored_hash(root: epath.PathLike, manifest: Manifest, name: str) -> str:
    """Read the parameters of a role and return their hash, as `write_params` does. Raises
    BundleError."""
    digest = hashlib.sha256()
    leaves = _as_written(manifest, name, stored_dtypes(root, manifest, name))
    for path, array in read_leaves(root, manifest, name, leaves):
        add_leaf(digest, path, np.ascontiguousarray(array))
    return digest.hexdigest()


def is_as_recorded(root: epath.PathLike, manifest: Manifest, name: str) -> bool:
    """Return whether a role has the parameters whose hash its manifest records; True if it records
    none. Raises BundleError."""
    recorded = manifest.roles[name].source.get("sha256")
    return recorded is None or stored_hash(root, manifest, name) == recorded


def _as_written(manifest: Manifest, name: str, stored: Mapping[str, str]) -> Iterator[str]:
    """Yield the paths of a role's leaves in the order in which they were written."""
    spec, cfg = role_config(manifest, name)
    for path in registry.abstract_leaves(spec.kind, cfg):
        scale = path.removesuffix("kernel") + SCALE
        yield from (leaf for leaf in dict.fromkeys((path, scale)) if leaf in stored)
