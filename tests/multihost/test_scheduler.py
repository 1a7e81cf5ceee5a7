"""Processes that SLURM starts: which GPUs they take, and what they say."""

import os
import socket
import subprocess
import sys

import pytest

from tests.fixtures.hosts import ended
from tests.fixtures.paths import ROOT

PROGRAM = """
import jax
from framepack_jax.cli.common import MultihostFlags
MultihostFlags(coordinator_address="auto", startup_seconds=60).join()
print(jax.config.values["jax_cuda_visible_devices"])
"""


@pytest.mark.parametrize(("tasks", "expected"), [(1, ["all"]), (2, ["0,1,2,3", "4,5,6,7"])])
def test_all_gpus_of_a_node_are_taken(tasks, expected) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    slurm = {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": str(tasks), "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0",
        "SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
        "JAX_COORDINATOR_PORT": port, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(tasks)
    ]  # fmt: skip
    found = ended(started)
    assert [code for code, *_ in found] == [0] * tasks, found
    lines = [out.splitlines() for _, out, _ in found]
    assert [each[-1] for each in lines] == expected
    processes = "1 process" if tasks == 1 else "2 processes"
    assert lines[0][0] == f"{processes}, {2 * tasks} devices (cpu)"
