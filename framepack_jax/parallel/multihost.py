"""Several processes that run one program, as on the hosts of a pod.

Each runs the same commands on the devices of all of them. Files that are written belong to the
first process: what it reads and writes, and what fails with it, is told to all others, so that all
go the same way. Where there is one process only, nothing here does anything.
"""

import functools
import hashlib
import itertools
import pickle
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from framepack_jax.utils.messages import first_line

P = ParamSpec("P")
T = TypeVar("T")
# Seconds until the others notice that a process is gone, or leaves alone.
HEARTBEAT_TIMEOUT_S = 30
# Bytes of the smallest message; longer ones are padded to powers of two, for few compilations.
MESSAGE = 1 << 12
# Whether work is under way that talks to no other process.
_inside = False
_asked = itertools.count()


def join(coordinator: str, count: int | None = None, index: int | None = None) -> None:
    """Become one of `count` processes, number `index` from 0; before anything is computed.

    `coordinator` is HOST:PORT of the first, or "auto" where the surroundings tell all three: SLURM,
    Open MPI, Kubernetes, TPU pods. Raises ValueError where they do not, or the numbers do not go
    together, or the others do not come.
    """
    if coordinator == "auto":
        address = None
    elif ":" not in coordinator:
        raise ValueError(f"coordinator {coordinator!r}: expected HOST:PORT of process 0, or auto")
    elif count is None or index is None or not 0 <= index < count:
        raise ValueError(
            f"coordinator {coordinator}: process {index} of {count} processes; give their number"
            " and that of this one, from 0"
        )
    else:
        address = coordinator
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:
        line = first_line(error)
        raise ValueError(
            f"processes did not find each other by {coordinator} ({line}); give HOST:PORT of"
            " process 0, the number of processes, and that of this one"
        ) from error


def is_primary() -> bool:
    """Whether files are written here."""
    return jax.process_index() == 0


def on_primary(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `work` in the first process; all get its result, or raise its error.

    Results and errors are pickled. All processes must come here in the same order.
    """
    if jax.process_count() == 1 or _inside:
        return work(*args, **kwargs)
    outcome = _call_locally(work, *args, **kwargs) if is_primary() else None
    return _unwrap(_broadcast(outcome, 0))


def on_all_hosts(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `work` in each process for itself; where it fails in one, all raise the error of the
    first of those."""
    if jax.process_count() == 1 or _inside:
        return work(*args, **kwargs)
    outcome = _call_locally(work, *args, **kwargs)
    failed = multihost_utils.process_allgather(np.int32(not outcome[0]))
    if failed.any():
        outcome = _broadcast(outcome, int(failed.argmax()))
    return _unwrap(outcome)


def assert_same_on_hosts(what: str, *values: Any) -> None:
    """Raise ValueError in all processes where they differ in values (which are pickled)."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(pickle.dumps(values)).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if others := [i for i, d in enumerate(digests) if (d != digests[0]).any()]:
        raise ValueError(
            f"{what} of process {', '.join(map(str, others))} differ from those of process 0; give"
            " all processes the same"
        )


def is_collective_error(error: Exception) -> bool:
    """Whether all processes have this error: they were told of it, or all came to it alike."""
    return jax.process_count() == 1 or isinstance(error, ValueError) or hasattr(error, "told")


def stopping() -> bool:
    """Whether some process was sent SIGTERM, which `join` keeps from ending it. All processes must
    ask equally often, and all get the answer at the same time: a few questions after the signal."""
    if jax.process_count() == 1:
        return False
    return multihost_utils.reached_preemption_sync_point(next(_asked))


class Terminated(KeyboardInterrupt):
    """SIGTERM: leave as after Ctrl-C."""


def stop_if_asked() -> None:
    """Stop here all of several processes of which one was sent SIGTERM (`stopping`). Raises
    Terminated."""
    if stopping():
        raise Terminated


def place(tree: Any, bound: bool = False) -> Any:
    """Arrays, the same in all processes, whole on every device of the mesh in use
    (`jax.set_mesh`); on the default device where there is none, to which they may be `bound`."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        tree = jax.device_put(tree)
        return jax.device_put(tree, jax.tree.map(lambda x: x.sharding, tree)) if bound else tree
    whole = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, whole)

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, whole)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, whole, x.__getitem__)

    return jax.tree.map(put, tree)


def fetch(tree: Any) -> Any:
    """Arrays of many devices, whole on one device of each process, to go on with outside of the
    mesh."""
    return jax.tree.map(_fetched, tree)


def _fetched(x: jax.Array) -> jax.Array:
    if len(x.sharding.device_set) == 1:
        return x
    if not x.is_fully_replicated:
        x = _gather(x.sharding.mesh)(x)
    return x.addressable_data(0)


@functools.cache
def _gather(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _call_locally(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[bool, Any]:
    """(whether it succeeded, result or error); in it `on_primary` and `on_all_hosts` call."""
    global _inside
    _inside = True
    try:
        return True, work(*args, **kwargs)
    except Exception as error:
        return False, error
    finally:
        _inside = False


def _broadcast(value: Any, source: int) -> Any:
    """The value of process `source`, in all."""
    mine = jax.process_index() == source
    data = np.frombuffer(_pickled(value) if mine else b"", np.uint8)
    told = functools.partial(multihost_utils.broadcast_one_to_all, is_source=mine)
    length = int(told(np.int32(len(data))))
    padded = np.zeros(max(MESSAGE, 1 << (length - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    return pickle.loads(told(padded)[:length].tobytes())


def _pickled(value: tuple[bool, Any]) -> bytes:
    """An error that does not come out of its pickle again is told by its text."""
    data = pickle.dumps(value)
    try:
        pickle.loads(data)
    except TypeError:
        data = pickle.dumps((False, RuntimeError(f"{type(value[1]).__name__}: {value[1]}")))
    return data


def _unwrap(outcome: tuple[bool, Any]) -> Any:
    succeeded, value = outcome
    if not succeeded:
        value.told = True
        raise value
    return value
