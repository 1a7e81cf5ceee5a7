"""GPUs of a process, from the variables of SLURM and Open MPI."""

import pytest

from framepack_jax.parallel.scheduler import DeviceShare, device_share

# Node 3 of 8 nodes of 8 GPUs.
NODE = {"SLURM_LOCALID": "0", "SLURM_NODEID": "3", "SLURM_GPUS_ON_NODE": "8"}
ALL_SEEN = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        # One task a node: all GPUs, not the one that LOCALID names.
        (NODE | ALL_SEEN | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, DeviceShare(None, 8)),
        (NODE | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "8"}, DeviceShare(None, 8)),
        # One task a GPU.
        (
            NODE | ALL_SEEN | {"SLURM_STEP_TASKS_PER_NODE": "8(x8)", "SLURM_LOCALID": "5"},
            DeviceShare((5,), 1),
        ),
        # Two tasks a node.
        (
            NODE | ALL_SEEN | {"SLURM_STEP_TASKS_PER_NODE": "2(x8)", "SLURM_LOCALID": "1"},
            DeviceShare((4, 5, 6, 7), 4),
        ),
        # SLURM shows each task its own GPU.
        (
            NODE
            | {
                "SLURM_STEP_TASKS_PER_NODE": "8(x8)", "SLURM_LOCALID": "5",
                "CUDA_VISIBLE_DEVICES": "0",
            },
            DeviceShare(None, 1),
        ),
        # Nodes with different numbers of tasks.
        (NODE | {"SLURM_STEP_TASKS_PER_NODE": "8(x3),1,4"}, DeviceShare(None, 8)),
        (
            NODE | {"SLURM_STEP_TASKS_PER_NODE": "8(x3),1,4", "SLURM_NODEID": "4"},
            DeviceShare((0, 1), 2),
        ),
        # Processes without GPUs.
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}, None),
        # Open MPI.
        (
            {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            DeviceShare(None, None),
        ),
        (
            {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"} | ALL_SEEN,
            DeviceShare((4, 5, 6, 7), 4),
        ),
    ],
)  # fmt: skip
def test_the_processes_of_a_node_share_its_gpus(env, expected) -> None:
    assert device_share(env) == expected


def test_processes_that_do_not_divide_the_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="3 processes share the 8 GPUs of a node"):
        device_share(NODE | {"SLURM_STEP_TASKS_PER_NODE": "3(x8)"})
