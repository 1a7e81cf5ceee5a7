"""Choose the mesh of a training step (`--mesh auto`): rank meshes by arithmetic, compile the first
few, and take the fastest by the model of the dry run.

The arithmetic counts the bytes that a device receives: weights gathered over `fsdp`, gradients
reduced over `fsdp` and `data`, and activations exchanged over `context` and `tensor`.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from etils import epath

from framepack_jax import bundle
from framepack_jax.parallel import device_grid, hardware, sharding
from framepack_jax.parallel.hardware import Machine
from framepack_jax.planning.programs import RefusedError
from framepack_jax.planning.training import TrainingReport, dry_run_training, sample_tokens
from framepack_jax.training import default_mesh, state
from framepack_jax.training.config import TrainConfig

LOGGER = logging.getLogger(__name__)
# Number of meshes to compile.
COMPILED = 4
# A step of this many rooflines ends the search: all meshes have the same roofline, so no other mesh
# can be faster by more.
CLOSE = 1.01
# Runs of a block with its weights gathered: forward, again for the gradient, and the gradient.
PASSES = 3
COMPUTE_BYTES, MASTER_BYTES = 2, 4
# Largest sizes of the axes that exchange activations.
MAX_CONTEXT, MAX_TENSOR = 4, 4


def choose(
    cfg: TrainConfig,
    bundle_path: epath.PathLike,
    machine: Machine,
    size: tuple[int, int],
    devices: Sequence[jax.Device] | None = None,
) -> list[TrainingReport]:
    """Compile a training step for the most promising meshes; return the reports, the best first.

    A mesh that fits comes before one that does not, then the shorter modelled step. Four meshes are
    compiled, more until one fits, and fewer if one that fits is as fast as its roofline. `devices`
    are those of the machine; default: the compiler's. Raises ValueError if no mesh divides the
    batch.
    """
    devices = hardware.compile_devices(machine) if devices is None else devices
    manifest = bundle.read_manifest(bundle_path)
    ranked = rank(cfg, manifest, machine, devices, size)
    if not ranked:
        raise ValueError(
            f"no mesh of {machine.count} devices divides --batch {cfg.batch} in"
            f" {cfg.grad_accum_steps} parts over data x fsdp; give a multiple of a divisor of"
            f" {machine.count}"
        )
    reports: list[TrainingReport] = []
    refused = None
    for sizes in ranked:
        try:
            reports.append(dry_run_training(cfg, bundle_path, machine, sizes, size, devices))
        except RefusedError as error:
            LOGGER.info(f"mesh {axes_text(sizes)}: {error}")
            refused = error
            continue
        LOGGER.info(f"mesh {summary(reports[-1])}")
        if is_enough(reports):
            break
    if refused is not None and not reports:
        raise refused
    return sorted(reports, key=quality)


def is_enough(reports: Sequence[TrainingReport]) -> bool:
    """Return True if `--mesh auto` compiles no mesh after these."""
    fitting = [report for report in reports if report.fits]
    close = any(near_roofline(report, CLOSE) for report in fitting)
    return close or (len(reports) >= COMPILED and bool(fitting))


def near_roofline(report: TrainingReport, ratio: float) -> bool:
    """Return True if the modelled step takes at most `ratio` rooflines."""
    seconds = report.step_seconds
    return seconds is not None and seconds <= ratio * report.roofline_seconds


def quality(report: TrainingReport) -> tuple[bool, float, int]:
    """Return the key that sorts reports, the best first."""
    seconds = report.step_seconds
    return not report.fits, math.inf if seconds is None else seconds, report.total


def summary(report: TrainingReport) -> str:
    """Return the figures of a mesh that decide."""
    seconds = "not modelled" if report.step_seconds is None else f"{report.step_seconds:.3f} s"
    fits = "fits" if report.fits else "does not fit"
    held = f"{report.total / 1e9:.1f} GB a device"
    return f"{axes_text(report.mesh)}: {seconds} a step, {held}, {fits}"


def axes_text(sizes: Mapping[str, int]) -> str:
    """Return the axes that divide a mesh, as --mesh takes them."""
    return ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "one device"


def rank(
    cfg: TrainConfig,
    manifest: bundle.Manifest,
    machine: Machine,
    devices: Sequence[jax.Device],
    size: tuple[int, int],
) -> list[dict[str, int]]:
    """Return all meshes that divide the network and the batch, the least modelled time first."""
    work = _work(cfg, manifest, machine, devices, size)
    room = default_mesh.STATE_SHARE * machine.chip.memory

    def order(found: tuple[dict[str, int], int]) -> tuple[bool, float]:
        sizes, held = found
        return held > room, work.seconds(sizes)

    return [sizes for sizes, _ in sorted(_meshes(cfg, manifest, machine.count), key=order)]


@dataclasses.dataclass(frozen=True)
class _Work:
    """The bytes that a step moves: `trained` of all `parameters`, and the samples of a batch."""

    machine: Machine
    device: jax.Device
    domains: int
    parameters: int
    trained: int
    batch: int
    tokens: int
    width: int
    blocks: int

    def seconds(self, sizes: Mapping[str, int]) -> float:
        """Return the time of all exchanges of a step."""
        data, fsdp, context, tensor = (sizes[axis] for axis in sharding.AXES)
        held = self.parameters / tensor
        local = self.batch / (data * fsdp) * self.tokens * self.width * COMPUTE_BYTES
        scattered = 2 if self.whole(fsdp) else 1
        moved = {
            "fsdp": PASSES * COMPUTE_BYTES * held
            + scattered * MASTER_BYTES * self.trained / tensor,
            # An all-reduce is a reduce-scatter and an all-gather.
            "data": 2 * MASTER_BYTES * self.trained / (tensor * fsdp),
            # Queries, keys, values and the result.
            "context": PASSES * self.blocks * 4 * local / context / tensor,
            "tensor": PASSES * self.blocks * 4 * local / context,
        }
        return sum(self._time(axis, sizes, size) for axis, size in moved.items())

    def whole(self, fsdp: int) -> bool:
        return default_mesh.whole_slice(self.device, self.machine.count // self.domains, fsdp)

    def _time(self, axis: str, sizes: Mapping[str, int], size: float) -> float:
        """Return the time in which a device receives its part of `size` bytes over an axis.

        Over TPU slices the compiler exchanges parts that are divided within each slice. Over nodes
        every device is counted as the receiver of all other devices' parts, as `hlo` does.
        """
        count = sizes[axis]
        over = device_grid.domains_along(sizes, self.domains)[axis]
        within = count // over
        near = size * (within - 1) / (within if self.device.platform == "tpu" else count)
        far = size * (over - 1) / over
        if self.device.platform == "tpu":
            far /= within
        chip = self.machine.chip
        links = self.machine.links or math.inf
        network = chip.network or chip.links
        return near / links + far / network


def _work(
    cfg: TrainConfig,
    manifest: bundle.Manifest,
    machine: Machine,
    devices: Sequence[jax.Device],
    size: tuple[int, int],
) -> _Work:
    model = state.model_of(cfg, manifest)
    trained, frozen = (
        sum(math.prod(p.shape) for p in jax.tree.leaves(tree))
        for tree in state.abstract_params(cfg, model)
    )
    return _Work(
        machine=machine,
        device=devices[0],
        domains=len(device_grid.domains(devices)),
        parameters=trained + frozen,
        trained=trained,
        batch=cfg.batch // cfg.grad_accum_steps,
        tokens=sample_tokens(cfg, manifest, size),
        width=model.cfg.width,
        blocks=sum(getattr(model.cfg, field) for field in model.spec.stacks.values()),
    )


def _meshes(
    cfg: TrainConfig, manifest: bundle.Manifest, count: int
) -> Iterator[tuple[dict[str, int], int]]:
    """Yield all meshes that divide the batch and the network, with the bytes of parameters and
    optimizer state on a device."""
    model = state.model_of(cfg, manifest)
    batch = cfg.batch // cfg.grad_accum_steps

    @functools.cache
    def held(fsdp: int, tensor: int) -> int | None:
        with contextlib.suppress(ValueError):
            return default_mesh.state_bytes(cfg, manifest, fsdp, tensor)
        return None

    for tensor, context in itertools.product(_divisors(MAX_TENSOR), _divisors(MAX_CONTEXT)):
        ways, rest = divmod(count, tensor * context)
        if rest or batch % ways:
            continue
        for fsdp in _divisors(ways):
            sizes = {"data": ways // fsdp, "fsdp": fsdp, "context": context, "tensor": tensor}
            if (size := held(fsdp, tensor)) is not None and _divides_heads(model, sizes):
                yield sizes, size


def _divides_heads(model: state.Model, sizes: dict[str, int]) -> bool:
    with contextlib.suppress(ValueError):
        model.spec.check_mesh(model.cfg, sizes)
        return True
    return False


def _divisors(n: int) -> list[int]:
    return [size for size in range(1, n + 1) if n % size == 0]
