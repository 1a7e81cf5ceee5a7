"""Orbax contexts to read and to write the parameters of a bundle."""

from orbax.checkpoint.experimental import v1 as ocp


def reading() -> ocp.Context:
    """Return a context that reads some leaves of a checkpoint, also of one in an object store that
    was copied there: a bundle is complete once it has a manifest."""
    context = ocp.Context()
    context.atomicity.allow_legacy_atomic_rename = True
    context.pytree.loading.partial_load = True
    return context


def writing() -> ocp.Context:
    """Return a context without compression, which would take three times as long as writing and
    hardly shrinks weights."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context
