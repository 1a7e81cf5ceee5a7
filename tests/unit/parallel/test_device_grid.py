"""Places of devices in meshes: stand-ins for the GPUs of nodes, and the TPU compiler's devices."""

from types import SimpleNamespace

import numpy as np
import pytest

from framepack_jax.parallel import device_grid, hardware, sharding


def gpus(nodes: list[int]) -> list:
    """One H100 for each entry, which is the number of its node, each in a process of its own."""
    return [
        SimpleNamespace(
            id=i, platform="gpu", device_kind="NVIDIA H100", slice_index=node, process_index=i
        )
        for i, node in enumerate(nodes)
    ]


EIGHT_NODES, SIX_NODES = [n // 8 for n in range(64)], [n // 4 for n in range(24)]


def tpus(name: str) -> list:
    return hardware.compile_devices(hardware.parse(name))


def domains_along(grid: np.ndarray, axis: int) -> set[int]:
    """Numbers of the domains that devices along an axis are in, each counted from the first's."""
    domain = np.reshape(device_grid.domain_numbers(list(grid.flat)), grid.shape)
    return set(map(len, map(set, np.moveaxis(domain, axis, -1).reshape(-1, grid.shape[axis]))))


@pytest.mark.parametrize(
    ("machine", "sizes", "crossing"),
    [
        # Axes of AXES, and how many nodes or slices each spans.
        (EIGHT_NODES, (8, 8, 1, 1), (8, 1, 1, 1)),
        (EIGHT_NODES, (1, 8, 8, 1), (1, 1, 8, 1)),
        (EIGHT_NODES, (16, 2, 1, 2), (8, 1, 1, 1)),
        (EIGHT_NODES, (4, 16, 1, 1), (4, 2, 1, 1)),
        (SIX_NODES, (4, 3, 2, 1), (2, 3, 1, 1)),
        ("2*v5e-16", (2, 16, 1, 1), (2, 1, 1, 1)),
        ("2*v5e-16", (8, 4, 1, 1), (2, 1, 1, 1)),
        ("2*v5e-16", (1, 32, 1, 1), (1, 2, 1, 1)),
        ("2*v5p:2x2x4", (1, 8, 2, 2), (1, 1, 2, 1)),
    ],
)
def test_data_crosses_the_network_first_and_tensor_last(machine, sizes, crossing) -> None:
    devices = tpus(machine) if isinstance(machine, str) else gpus(machine)
    grid = device_grid.arrange(dict(zip(sharding.AXES, sizes, strict=True)), devices)
    assert grid.shape == sizes and len({device.id for device in grid.flat}) == len(devices)
    for axis, expected in enumerate(crossing):
        assert domains_along(grid, axis) == {expected}


def test_the_order_of_devices_does_not_matter() -> None:
    mixed = gpus([n % 2 for n in range(8)])
    grid = device_grid.arrange({"data": 2, "fsdp": 4, "context": 1, "tensor": 1}, mixed)
    assert [[d.id for d in row.flat] for row in grid] == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ("kind", "count", "process", "domains"),
    [
        # A process for each node of eight; one for each GPU; nodes of four, which NVLink joins.
        ("NVIDIA H100", 64, 8, 8),
        ("NVIDIA H100", 64, 1, 8),
        ("NVIDIA H100", 8, 4, 2),
        ("NVIDIA GB200", 144, 4, 2),
        ("NVIDIA GB200", 144, 1, 2),
        ("NVIDIA T4", 8, 4, 2),
    ],
)
def test_nodes_of_gpus_of_which_jax_knows_no_slices(kind, count, process, domains) -> None:
    devices = [
        SimpleNamespace(
            id=i, platform="gpu", device_kind=kind, slice_index=0, process_index=i // process
        )
        for i in range(count)
    ]
    parts = device_grid.domains(devices)
    assert len(parts) == domains
    assert [device.id for device in parts[-1]] == list(range(count - count // domains, count))


def test_a_mesh_over_slices_is_made() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=-1, devices=tpus("2*v5e-4"))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}


def test_parts_of_slices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the slices or nodes have 8, 4 devices; .* use whole"):
        sharding.make_mesh(fsdp=12, devices=gpus([n // 8 for n in range(12)]))


def test_an_unknown_arrangement_is_an_error_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"mesh .*tensor.: 3") as raised:
        device_grid.arrange({"data": 1, "fsdp": 1, "context": 1, "tensor": 3}, tpus("v5e:2x2")[:3])
    assert "\n" not in str(raised.value)
