"""Run one program in several processes, as on the hosts of a pod.

Each process runs the same commands on the devices of all of them. The first process reads and
writes the files and sends its results and errors to the others, so that all take the same branch.
With a single process these functions do nothing.
"""

import functools
import hashlib
import itertools
import pickle
import socket
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from framepack_jax.parallel.scheduler import DeviceShare, device_share
from framepack_jax.utils.compare import differences
from framepack_jax.utils.messages import first_line, shorten

P = ParamSpec("P")
T = TypeVar("T")
# Seconds until the other processes detect the loss of a process, and until a process that waits
# for the others to start gives up: the defaults of JAX.
HEARTBEAT_SECONDS, STARTUP_SECONDS = 100, 300
# Bytes of the smallest message; longer ones are padded to powers of two, for few compilations.
MESSAGE = 1 << 12
# True while work runs that must not communicate with other processes.
_inside = False
_asked = itertools.count()


def join(
    coordinator: str,
    count: int | None = None,
    index: int | None = None,
    *,
    heartbeat: int = HEARTBEAT_SECONDS,
    startup: int = STARTUP_SECONDS,
) -> None:
    """Become one of `count` processes, number `index` from 0; call it before any computation.

    `coordinator` is HOST:PORT of the first process, or "auto" if the environment (SLURM, Open MPI,
    Kubernetes, TPU pods) defines all three. `heartbeat` and `startup` are seconds.

    Raises ValueError if it does not, if the numbers are inconsistent, or if this process has fewer
    devices than the scheduler gave it; ConnectionError if the other processes do not connect.
    """
    if coordinator == "auto":
        address, share = None, device_share()
    elif ":" not in coordinator:
        raise ValueError(f"coordinator {coordinator!r}: expected HOST:PORT of process 0, or auto")
    elif count is None or index is None or not 0 <= index < count:
        raise ValueError(
            f"coordinator {coordinator}: process {index} of {count} processes; give their number"
            " and that of this one, from 0"
        )
    else:
        address, share = coordinator, None
    indices = None if share is None or share.indices is None else list(share.indices)
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            local_device_ids=indices,
            initialization_timeout=startup,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        line = first_line(error)
        raise ConnectionError(
            f"processes did not find each other by {coordinator} ({line}); give HOST:PORT of"
            " process 0, the number of processes, and that of this one"
        ) from error
    if share is not None:
        _take(share)


def _take(share: DeviceShare) -> None:
    """Use the GPUs of a share. Raises ValueError if JAX sees fewer."""
    if share.indices is None:
        # `initialize` has hidden all but one.
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, "all")
    if share.count is None or (jax.config.values["jax_platforms"] or "").startswith("cpu"):
        return
    found = jax.local_device_count() if jax.default_backend() == "gpu" else 0
    if found < share.count:
        raise ValueError(
            f"process {jax.process_index()} sees {found} of the {share.count} GPUs that the"
            " scheduler gave it; check CUDA_VISIBLE_DEVICES and that jax[cuda13] is installed"
        )


def leave() -> None:
    """Part from the other processes, once all do; no more communication is possible."""
    jax.distributed.shutdown()


def summary() -> str:
    """Describe the processes and devices that have joined: "8 processes, 64 devices (H100)"."""
    count, devices = jax.process_count(), jax.devices()
    return (
        f"{count} process{'es' * (count > 1)}, {len(devices)} device{'s' * (len(devices) > 1)}"
        f" ({devices[0].device_kind})"
    )


def here() -> str:
    """Name this process and its host in a message."""
    host = socket.gethostname()
    return host if jax.process_count() == 1 else f"process {jax.process_index()} on {host}"


def is_primary() -> bool:
    """Return True in the process that writes files."""
    return jax.process_index() == 0


def on_primary(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `work` in the first process; return its result, or raise its error, in all.

    Results and errors are pickled. All processes must make these calls in the same order.
    """
    if jax.process_count() == 1 or _inside:
        return work(*args, **kwargs)
    outcome = _call_locally(work, *args, **kwargs) if is_primary() else None
    return _unwrap(_broadcast(outcome, 0))


def on_all_hosts(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `work` in every process; if it fails in some, raise the first one's error in all.

    A TimeoutError, which tells of a wait for others, is the error of all only if there is no
    other."""
    if jax.process_count() == 1 or _inside:
        return work(*args, **kwargs)
    outcome = _call_locally(work, *args, **kwargs)
    kind = 0 if outcome[0] else 1 if isinstance(outcome[1], TimeoutError) else 2
    failed = multihost_utils.process_allgather(np.int32(kind))
    if failed.any():
        outcome = _broadcast(outcome, int(failed.argmax()))
    return _unwrap(outcome)


def assert_same_on_hosts(what: str, *values: Any) -> None:
    """Raise ValueError in all processes if their values, which are pickled, differ."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(pickle.dumps(values)).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if others := [i for i, d in enumerate(digests) if (d != digests[0]).any()]:
        raise ValueError(
            f"{what} of process {', '.join(map(str, others))} differ from those of process 0; give"
            " all processes the same"
        )


def assert_same_facts(
    collect: Callable[P, Mapping[str, Any]], *args: P.args, **kwargs: P.kwargs
) -> None:
    """Raise ValueError in all processes if the facts that they collect differ; it names each, with
    the processes, their hosts and values. Facts are pickled. One process collects none."""
    if jax.process_count() == 1:
        return
    facts = collect(*args, **kwargs)
    digest = hashlib.sha256(pickle.dumps(sorted(facts.items()))).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = [i for i, d in enumerate(digests) if (d != digests[0]).any()]
    if not others:
        return
    # What one of the others shows is enough to act on.
    (there, first), (here, second) = (
        _broadcast((socket.gethostname(), dict(facts)), source) for source in (0, others[0])
    )
    words = f"in process 0 on {there}", f"in process {others[0]} on {here}"
    more = f", and {len(others) - 1} more processes differ" if len(others) > 1 else ""
    raise ValueError(
        f"processes differ: {shorten(differences(first, second, words=words), separator='; ')}"
        f"{more}; give all processes the same"
    )


def is_collective_error(error: Exception) -> bool:
    """Return True if all processes raise this error: it was sent to them, or is a ValueError."""
    return jax.process_count() == 1 or isinstance(error, ValueError) or hasattr(error, "told")


def stopping() -> bool:
    """Return True if some process was sent SIGTERM, which `join` keeps from ending it.

    All processes must call it equally often. All get True at the same call, a few calls after the
    signal.
    """
    if jax.process_count() == 1:
        return False
    return multihost_utils.reached_preemption_sync_point(next(_asked))


class Terminated(KeyboardInterrupt):
    """SIGTERM: leave as after Ctrl-C."""


def stop_if_asked() -> None:
    """Raise Terminated in all processes if one of them was sent SIGTERM (`stopping`)."""
    if stopping():
        raise Terminated


def place(tree: Any, bound: bool = False) -> Any:
    """Replicate arrays, the same in all processes, over the mesh in use (`jax.set_mesh`).

    Without a mesh they go to the default device, to which they are committed if `bound`.
    """
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
    """Gather arrays of many devices on one device of each process, for use outside of the mesh."""
    return jax.tree.map(_fetched, tree)


def _fetched(x: jax.Array) -> jax.Array:
    if len(x.sharding.device_set) == 1:
        return x
    if not x.is_fully_replicated:
        x = _gather(x.sharding.mesh)(x)  # type: ignore[attr-defined]  # a NamedSharding
    return x.addressable_data(0)


@functools.cache
def _gather(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _call_locally(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[bool, Any]:
    """Return (True, result) or (False, error); `on_primary` and `on_all_hosts` in it stay local."""
    global _inside
    _inside = True
    try:
        return True, work(*args, **kwargs)
    except Exception as error:
        return False, error
    finally:
        _inside = False


def _broadcast(value: Any, source: int) -> Any:
    """Return the value of process `source` in all processes."""
    mine = jax.process_index() == source
    data = np.frombuffer(_pickled(value) if mine else b"", np.uint8)
    told = functools.partial(multihost_utils.broadcast_one_to_all, is_source=mine)
    length = int(told(np.int32(len(data))))
    padded = np.zeros(max(MESSAGE, 1 << (length - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    return pickle.loads(told(padded)[:length].tobytes())


def _pickled(value: tuple[Any, Any]) -> bytes:
    """Pickle an outcome; replace an error that cannot be unpickled by its text."""
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
