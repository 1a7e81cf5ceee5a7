"""Devices of a process, as SLURM and Open MPI describe them in the environment.

Under both, JAX takes one device for each process, number LOCALID of its node. That is right for one
process a device; a process that has its node to itself would leave all but one device idle.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

# Variables of SLURM and of Open MPI: index of a process on its node.
LOCAL_INDEX = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclasses.dataclass(frozen=True)
class DeviceShare:
    """The part of a node's GPUs that one process uses.

    `indices` are positions among the GPUs that the process sees; None: all of them. `count` is
    their number, None if the scheduler does not tell.
    """

    indices: tuple[int, ...] | None
    count: int | None


def device_share(env: Mapping[str, str] = os.environ) -> DeviceShare | None:
    """Return the GPUs of this process: an equal share of its node's, all of them if it is alone.

    Returns None if no scheduler is detected, or if it gives several processes a node and names no
    GPUs. Raises ValueError if the processes of a node do not divide its GPUs.
    """
    tasks = _tasks_on_node(env)
    if tasks is None:
        return None
    given = _number(env.get("SLURM_GPUS_ON_NODE"))
    seen = _seen(env)
    if tasks == 1:
        return DeviceShare(None, given)
    visible = given if seen is None else seen
    if visible is None:
        return None
    if given is not None and visible * tasks <= given:
        # The scheduler shows each process its own GPUs only (--gpus-per-task, --gpu-bind).
        return DeviceShare(None, visible)
    if visible % tasks:
        raise ValueError(
            f"{tasks} processes share the {visible} GPUs of a node: expected a number that divides"
            f" {visible}; start 1 or {visible} on each node (SLURM: --ntasks-per-node)"
        )
    share = visible // tasks
    index = int(next(env[name] for name in LOCAL_INDEX if name in env))
    return DeviceShare(tuple(range(index * share, (index + 1) * share)), share)


def _tasks_on_node(env: Mapping[str, str]) -> int | None:
    """Return the number of processes of the job on this node."""
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if "SLURM_LOCALID" in env and per_node:
        counts = [
            count
            for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", per_node)
            for _ in range(int(times or 1))
        ]
        return int(counts[min(int(env.get("SLURM_NODEID", 0)), len(counts) - 1)])
    if "SLURM_LOCALID" in env and env.get("SLURM_NTASKS") == env.get("SLURM_STEP_NUM_NODES"):
        return 1
    return _number(env.get("OMPI_COMM_WORLD_LOCAL_SIZE"))


def _seen(env: Mapping[str, str]) -> int | None:
    """Return the number of GPUs that the environment shows to this process."""
    for name in VISIBLE:
        if env.get(name):
            return len(env[name].split(","))
    return None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
