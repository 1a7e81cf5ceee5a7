"""Open a bundle for sampling jobs, and load the weights and adapters that they need."""

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax

from framepack_jax import bundle, packing
from framepack_jax.conversion.lora import read as read_lora
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.jobs.provenance import weights
from framepack_jax.jobs.spec import ComputeOptions
from framepack_jax.jobs.task import Task
from framepack_jax.models import lora
from framepack_jax.models.tiling import Tiling
from framepack_jax.parallel import sharding
from framepack_jax.parallel.multihost import assert_same_on_hosts, on_all_hosts

logger = logging.getLogger(__name__)
# The backends of attention kernels; other kernels run on any backend.
KERNEL_BACKENDS = {"cudnn": "gpu", "splash": "tpu"}


def check_kernel(kernel: str, backend: str) -> None:
    """Raise ValueError if an attention kernel does not run on a backend."""
    needed = KERNEL_BACKENDS.get(kernel, backend)
    if needed != backend:
        raise ValueError(
            f"attention kernel {kernel!r} runs on {needed}, this is a {backend}; use auto or xla"
        )


def tiling_of(tile: int | None) -> Tiling:
    """Return tiles of this many pixels that overlap by a quarter; None gives whole frames."""
    return Tiling() if tile is None else Tiling(size=tile, stride=tile * 3 // 4)


def open_pipe(
    path: str | Path,
    dtype: str | None,
    schedule: str | None,
    tile: int | None,
    mesh: str | None = None,
) -> FramePack:
    """Open a bundle without its weights. Several processes always get a mesh."""
    sizes = {} if mesh is None else sharding.parse_mesh(mesh)
    if mesh is None and jax.process_count() > 1:
        _, cfg = bundle.role_config(bundle.read_manifest(path), "transformer")
        sizes = sharding.default_sizes(jax.device_count(), cfg.heads)
    devices = sharding.make_mesh(**sizes, devices=jax.devices()) if sizes else None
    tiling = tiling_of(tile)
    parsed = packing.parse(schedule) if schedule else None
    return FramePack.open(path, dtype=dtype, schedule=parsed, tiling=tiling, mesh=devices)


def check_bundle(path: str | Path, roles: Sequence[str] | None = None) -> None:
    """Raise ValueError on all hosts if one of them lacks these networks, by default those that
    sampling needs, or has other weights."""
    on_all_hosts(bundle.check_present, path, roles)
    there = weights(path)
    hashes = [there[role].get("sha256") for role in roles or sorted(there)]
    assert_same_on_hosts("the weights of the bundle", hashes)


def check_devices(pipe: FramePack, batch: int) -> None:
    """Raise ValueError if devices would repeat work; log if devices would stay idle."""
    if pipe.mesh is None and (count := jax.device_count()) > 1:
        logger.info(
            "of %d devices one is used; --mesh divides weights and work over all of them", count
        )
    if pipe.mesh is not None and batch % pipe.mesh.shape["data"]:
        data = pipe.mesh.shape["data"]
        raise ValueError(
            f"batch = {batch} on a mesh with data={data}: devices would make the same video; give"
            f" --batch {data} and as many videos, or put them on fsdp and context"
        )


def load_weights(
    pipe: FramePack,
    path: str | Path,
    compute: ComputeOptions,
    tasks: Sequence[Task],
    *,
    batch: int = 1,
    roles: Sequence[str] | None = None,
    keep_tiling: bool = False,
) -> FramePack:
    """Load the weights of some tasks, and note in their records which ones were offloaded.

    With `keep_tiling`, a task is decoded in the tiles that it was started with, unless `compute`
    says otherwise.
    """
    canvas = max((task.layout.canvas for task in tasks), key=math.prod)
    offload = compute.offload or tasks[0].run.record.get("offload", "auto")
    encoded = max(task.layout.encoded for task in tasks)
    plan = pipe.plan(path, offload, canvas, batch, roles, encoded)
    tile = tasks[0].run.record.get("decode_tile")
    if tile and keep_tiling and not (compute.offload or compute.vae_tile):
        plan = plan._replace(tiling=tiling_of(tile))
    if plan.why:
        logger.info(plan.why)
    for task in tasks:
        task.run.record |= {"offload": offload, "decode_tile": plan.tiling.size}
    return pipe.with_weights(path, roles, plan)


def read_loras(pipe: FramePack, files: Sequence[str]) -> lora.LoRA:
    """Read adapters FILE:WEIGHT and add them up. Raises ValueError if one does not fit."""
    adapters = []
    for file, weight in map(lora.parse_weight, files):
        found = read_lora(Path(file), pipe.transformer.cfg)
        logger.info("%s: %s, weight %g", file, found.summary(), weight)
        if warning := found.warning():
            warnings.warn(f"{file}: {warning}", stacklevel=2)
        adapters.append((found.lora, weight))
    return lora.combine(adapters)
