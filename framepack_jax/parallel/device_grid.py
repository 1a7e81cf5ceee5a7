"""Place devices in a mesh so that the axes that move most bytes stay on the fastest links.

Links join the chips of a TPU slice and the GPUs of an NVLink domain, mostly a node. The slower data
centre network, or InfiniBand, joins slices and nodes.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

# Gathering weights moves more bytes than an all-to-all of tokens: `fsdp` stays within a domain.
# `data`, which only reduces gradients, crosses the network first.
NEAREST_LAST = ("data", "context", "fsdp", "tensor")


def domain_of(device: jax.Device) -> int:
    """Return the number of the TPU slice, or of the NVLink domain or node, of a device."""
    slice_index = getattr(device, "slice_index", None)
    if slice_index is None:
        slice_index = getattr(device, "partition_index", None)
    if slice_index is not None:
        return slice_index
    return device.process_index if device.platform in ("gpu", "cuda") else 0


def domains(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Divide devices into those that links join. Raises ValueError if their numbers differ."""
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        found.setdefault(domain_of(device), []).append(device)
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
