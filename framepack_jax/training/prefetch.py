"""Put batches on the devices before the step that takes them."""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from framepack_jax.parallel.sharding import BATCH
from framepack_jax.training.task import Loader
from framepack_jax.utils.prefetch import prefetch

AHEAD = 2


class Fed(NamedTuple):
    """A batch on the devices, the position of the loader after it, the loader's error if the batch
    is blank, and the seconds waited for it."""

    batch: Any
    state: dict[str, Any]
    error: Exception | None
    waited: float


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch over its leading axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def check_batch(batch: int, parts: int, mesh: Mesh) -> None:
    """Raise ValueError if the parts of a batch do not divide over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch // parts % ways:
        raise ValueError(
            f"--batch {batch} in {parts} parts does not divide over data x fsdp = {ways}"
            f" devices; give a multiple of {ways * parts}, or divide tokens and heads instead"
            " (--mesh with context and tensor)"
        )


def local_share(mesh: Mesh, batch: int) -> tuple[int, int]:
    """Return (index, count) of the equal share of a batch that this process feeds. Processes whose
    devices hold the same samples feed the same share."""
    rows: dict[int, set[int]] = {}
    places: Mapping[jax.Device, Any] = batch_sharding(mesh).devices_indices_map((batch,))
    for device, (where,) in places.items():
        rows.setdefault(device.process_index, set()).update(range(batch)[where])
    shares = sorted({tuple(sorted(each)) for each in rows.values()})
    if sum(map(len, shares)) != batch:
        raise ValueError(
            f"the mesh {dict(mesh.shape)} gives processes overlapping parts of a batch; choose"
            " sizes of data and fsdp that hosts divide evenly"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def place(batch: Any, mesh: Mesh, size: int) -> Any:
    """Make the global batch of `size` samples from the share of each process."""
    where = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(where, x, (size, *x.shape[1:]))

    return jax.tree.map(put, batch)


def feed(
    loader: Loader, mesh: Mesh, size: int, blank: Callable[[int], Any] | None = None
) -> Generator[Fed, None, None]:
    """Yield batches of a loader, the next `AHEAD` of them on their way to the devices.

    An error of the loader is raised in place of its batch. With `blank`, which makes a batch for
    the number of batches since the error, blank batches come instead: the other hosts, which cannot
    know yet, take the same steps.
    """

    def placed() -> Iterator[tuple[Any, dict[str, Any], Exception | None]]:
        for batch, error in _endless(loader, blank):
            yield place(batch, mesh, size), loader.get_state(), error

    with contextlib.closing(prefetch(placed(), AHEAD)) as batches:
        while True:
            began = time.monotonic()
            batch, position, error = next(batches)
            yield Fed(batch, position, error, time.monotonic() - began)


def _endless(
    loader: Loader, blank: Callable[[int], Any] | None
) -> Iterator[tuple[Any, Exception | None]]:
    """Yield (batch, None), and after an error of the loader (blank batch, the error)."""
    try:
        for batch in loader:
            yield batch, None
    except Exception as error:
        if blank is None:
            raise
        yield from ((blank(number), error) for number in itertools.count())
