"""Orbax contexts to read and to write the parameters of a bundle."""

from collections.abc import Mapping
from typing import Any

from etils import epath
from orbax.checkpoint.experimental import v1 as ocp

from framepack_jax.bundle.manifest import BundleError


def reading() -> ocp.Context:
    """Return a context that reads some leaves of a checkpoint, also of one in an object store that
    was copied there: a bundle is complete once it has a manifest."""
    context = ocp.Context()
    context.atomicity.allow_legacy_atomic_rename = True
    context.pytree.loading.partial_load = True
    return context


def metadata(path: epath.PathLike) -> Mapping[str, Any]:
    """Return the tree of shapes and types of a checkpoint. Raises BundleError if it is damaged."""
    with reading():
        tree = ocp.metadata(path).metadata
    if not isinstance(tree, Mapping):
        raise BundleError(
            f"the parameters at {path} cannot be read: files are missing or damaged; copy or"
            " convert the bundle again"
        )
    return tree


def writing() -> ocp.Context:
    """Return a context without compression, which would take three times as long as writing and
    hardly shrinks weights."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context
