"""Place devices in a mesh so that the axes that move most bytes stay on the fastest links.

Links join the chips of a TPU slice and the GPUs of an NVLink domain, mostly a node. The slower data
centre network, or InfiniBand, joins slices and nodes.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from framepack_jax.parallel.chips import chip_of

# Gathering weights moves more bytes than an all-to-all of tokens: `fsdp` stays within a domain.
# `data`, which only reduces gradients, crosses the network first.
NEAREST_LAST = ("data", "context", "fsdp", "tensor")


def domain_numbers(devices: Sequence[jax.Device]) -> list[int]:
    """Return for each device the number of its TPU slice, or of its node or NVLink domain.

    Of GPUs JAX may know no more than the process. A process is a node, unless it has one GPU of
    several, or NVLink joins several nodes; then as many GPUs as the chip's table says make one.
    """
    slices = [_slice_index(device) for device in devices]
    if devices[0].platform not in ("gpu", "cuda") or len(set(slices)) > 1:
        return slices
    processes = Counter(device.process_index for device in devices)
    chip = chip_of(devices[0])
    if chip is None or (max(processes.values()) > 1 and chip.domain == chip.host):
        return [device.process_index for device in devices]
    order = sorted(devices, key=lambda device: (device.process_index, device.id))
    numbers = {device.id: place // chip.domain for place, device in enumerate(order)}
    return [numbers[device.id] for device in devices]


def _slice_index(device: jax.Device) -> int:
    names = ("slice_index", "partition_index")
    return next((found for name in names if (found := getattr(device, name, None)) is not None), 0)


def domains(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Divide devices into those that links join. Raises ValueError if their numbers differ."""
    found: dict[int, list[jax.Device]] = {}
    for device, number in zip(devices, domain_numbers(devices), strict=True):
        found.setdefault(number, []).append(device)
    parts = [found[number] for number in sorted(found)]
    if len({len(part) for part in parts}) > 1:
        sizes = ", ".join(str(len(part)) for part in parts)
        raise ValueError(
            f"the slices or nodes have {sizes} devices; a mesh needs as many of each: use whole"
            " slices or nodes"
        )
    return parts


def arrange(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Return devices in a grid with the axes of `sizes`, in their order.

    The first axes of NEAREST_LAST are divided over domains, the others stay within one. Raises
    ValueError if the domains have other sizes, or if JAX knows no such grid.
    """
    parts = domains(devices)
    outer, inner = _divide({name: sizes[name] for name in NEAREST_LAST}, len(parts))
    try:
        # Some machines fit a shape only if one physical axis serves two axes of the mesh.
        grids = [
            mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
            for part in parts
        ]
    except (NotImplementedError, AssertionError) as error:
        raise ValueError(f"mesh {dict(sizes)} on {len(devices)} devices: {error}") from error
    grid = np.stack(grids).reshape(*outer, *inner)
    # Each axis is its part over domains, then its part within one.
    pairs = [axis for i in range(len(outer)) for axis in (i, i + len(outer))]
    grid = grid.transpose(pairs).reshape([sizes[name] for name in NEAREST_LAST])
    return grid.transpose([NEAREST_LAST.index(name) for name in sizes])


def domains_along(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Return how many of `count` domains each axis of a mesh spans."""
    names = {name: sizes[name] for name in NEAREST_LAST}
    return dict(zip(names, _divide(names, count)[0], strict=True))


def _divide(sizes: Mapping[str, int], count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide the sizes of axes into factors over `count` domains and factors within one."""
    outer = []
    for size in sizes.values():
        outer.append(math.gcd(size, count))
        count //= outer[-1]
    return tuple(outer), tuple(n // o for n, o in zip(sizes.values(), outer, strict=True))
