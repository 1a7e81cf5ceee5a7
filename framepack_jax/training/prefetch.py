"""Batches on the devices ahead of the step that takes them."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from framepack_jax.parallel.sharding import BATCH

AHEAD = 2


class Fed(NamedTuple):
    """A batch on the devices, the loader's state after it, the seconds waited for it, and the error
    in the place of which it stands, if it is a blank one."""

    batch: Any
    state: dict[str, Any]
    error: Exception | None
    waited: float


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How the leading axis of a batch is divided."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def check_batch(batch: int, parts: int, mesh: Mesh) -> None:
    """Raise ValueError where the parts of a batch do not divide over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch // parts % ways:
        raise ValueError(
            f"--batch {batch} in {parts} parts does not divide over data x fsdp = {ways}"
            f" devices; give a multiple of {ways * parts}, or divide tokens and heads instead"
            " (--mesh with context and tensor)"
        )


def local_share(mesh: Mesh, batch: int) -> tuple[int, int]:
    """(index, count): which of how many equal shares of a batch this process feeds. Processes
    whose devices hold the same samples feed the same share."""
    rows: dict[int, set[int]] = {}
    for device, (where,) in batch_sharding(mesh).devices_indices_map((batch,)).items():
        rows.setdefault(device.process_index, set()).update(range(batch)[where])
    shares = sorted({tuple(sorted(each)) for each in rows.values()})
    if sum(map(len, shares)) != batch:
        raise ValueError(
            f"the mesh {dict(mesh.shape)} gives processes overlapping parts of a batch; choose"
            " sizes of data and fsdp that hosts divide evenly"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def place(batch: Any, mesh: Mesh, size: int) -> Any:
    """The share of this process as the global batch of `size` samples on the mesh."""
    where = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(where, x, (size, *x.shape[1:]))

    return jax.tree.map(put, batch)


def feed(
    loader: Any, mesh: Mesh, size: int, blank: Callable[[int], Any] | None = None
) -> Iterator[Fed]:
    """Yield batches of a loader, `AHEAD` of them on their way at a time; closing the iterator ends
    the thread.

    Errors of the loader are raised where its batch would have come. With `blank`, which makes a
    batch for the number of batches since the error, blank batches come from there on instead: the
    other processes, which cannot know yet, take the same steps.
    """
    ready: queue.Queue[Any] = queue.Queue(AHEAD)
    closed = threading.Event()

    def work() -> None:
        try:
            for batch, error in _endless(loader, blank):
                item = place(batch, mesh, size), loader.get_state(), error
                if not _put(ready, item, closed):
                    return
        except BaseException as error:
            _put(ready, error, closed)

    thread = threading.Thread(target=work, daemon=True, name="feed")
    thread.start()
    try:
        while True:
            began = time.monotonic()
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield Fed(*item, time.monotonic() - began)
    finally:
        closed.set()
        thread.join(timeout=10)


def _endless(loader: Any, blank: Callable[[int], Any] | None) -> Iterator[tuple[Any, Any]]:
    """(batch, None), and after an error of the loader (blank batch, the error)."""
    try:
        for batch in loader:
            yield batch, None
    except Exception as error:
        if blank is None:
            raise
        yield from ((blank(number), error) for number in itertools.count())


def _put(ready: queue.Queue[Any], item: Any, closed: threading.Event) -> bool:
    """Whether it was taken before the iterator was closed."""
    while not closed.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
