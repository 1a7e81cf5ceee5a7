"""Choose the mesh of a training run: weights divided over links, data over the network."""

import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType

from framepack_jax import bundle
from framepack_jax.parallel import device_grid, sharding
from framepack_jax.parallel.chips import chip_of
from framepack_jax.training import optimizer, state
from framepack_jax.training.config import TrainConfig

# Part of a device's memory that parameters and optimizer state may take. Gradients and activations
# need the rest.
STATE_SHARE = 0.5
# Devices of a TPU slice from which on no reduce-scatter spans the slice.
LARGE_SLICE = 16


def default_mesh(
    cfg: TrainConfig, manifest: bundle.Manifest, devices: Sequence[jax.Device]
) -> dict[str, int]:
    """Return sizes for `make_mesh`: `fsdp` within a TPU slice or node if the state fits, `data`
    across.

    Gathering weights over the network between nodes moves several times the bytes of reducing
    gradients over it. On TPUs `fsdp` is half of a slice of 16 chips or more (`whole_slice`). If the
    state takes more than half of a device, `fsdp` spans all of a slice or node, then several.
    Raises ValueError if no size divides the parameters.
    """
    chip = chip_of(devices[0])
    room = STATE_SHARE * chip.memory if chip else math.inf
    needs: dict[int, int] = {}
    problems: list[ValueError] = []
    parts = device_grid.domains(devices)
    halves = [len(parts[0]) // 2] if whole_slice(devices[0], len(parts[0]), len(parts[0])) else []
    for fsdp in [*halves, *_fsdp_sizes(parts)]:
        try:
            needs[fsdp] = state_bytes(cfg, manifest, fsdp)
        except ValueError as error:
            problems.append(error)
            continue
        if needs[fsdp] <= room:
            return {"data": len(devices) // fsdp, "fsdp": fsdp}
    if not needs:
        raise problems[0]
    fsdp = min(needs, key=needs.__getitem__)
    return {"data": len(devices) // fsdp, "fsdp": fsdp}


def whole_slice(device: jax.Device, near: int, fsdp: int) -> bool:
    """Return True if `fsdp` takes all `near` devices of a large TPU slice, or more.

    There libtpu (0.0.42) replaces every reduce-scatter of gradients by an all-reduce, which moves
    twice the bytes. If `data` divides the slice too, it does not.
    """
    return device.platform == "tpu" and near >= LARGE_SLICE and fsdp >= near


def state_bytes(cfg: TrainConfig, manifest: bundle.Manifest, fsdp: int, tensor: int = 1) -> int:
    """Count the bytes of all parameters, also of a teacher, and of the optimizer state on a device,
    divided over `fsdp` and `tensor`. Raises ValueError if they do not divide the parameters."""
    mesh = AbstractMesh((1, fsdp, 1, tensor), sharding.AXES, (AxisType.Auto,) * len(sharding.AXES))
    model = state.model_of(cfg, manifest)
    tx = optimizer.make(cfg.optimizer, model.spec.stacks)
    begun, frozen = state.abstract_state(cfg, model, tx, mesh)
    tree = begun, frozen, state.abstract_teacher(cfg, begun.params)
    return sharding.device_bytes(tree, state.shardings(tree))


def _fsdp_sizes(domains: Sequence[Sequence[jax.Device]]) -> Iterator[int]:
    """Yield sizes of `fsdp`: those within a domain from the largest, then whole domains."""
    near, count = len(domains[0]), len(domains)
    yield near
    for more in range(2, count + 1):
        if count % more == 0:
            yield near * more
    # Sizes that divide the parameters of no network above, as 72 of an NVLink domain.
    for fewer in range(near - 1, 0, -1):
        if near % fewer == 0:
            yield fewer
