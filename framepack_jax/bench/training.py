"""Measure a training step of random weights in the shapes of a bundle."""

import dataclasses
import statistics
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from framepack_jax import bundle
from framepack_jax.bench.memory import check_fits
from framepack_jax.bench.result import Result
from framepack_jax.bench.timing import LONG, ROUNDS, filled, program_bytes
from framepack_jax.bench.workload import Workload
from framepack_jax.diffusion import sampler
from framepack_jax.parallel import sharding, xla_flags
from framepack_jax.planning.training import abstract_samples, step_flops, task_without_data
from framepack_jax.training import state
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.default_mesh import default_mesh
from framepack_jax.training.flow_matching_task import Networks
from framepack_jax.training.task import StepMetrics
from framepack_jax.training.train_step import RATE, jit_train_step

LEARNING_RATE = 1e-4
Trainable = Literal["all", "context", "lora"]


@dataclasses.dataclass
class TrainingProgram:
    """A compiled training step, and its arguments on the devices of a mesh.

    `flops` is the sum over all devices, without what remat computes again.
    """

    compiled: Any
    args: list[Any]
    mesh: Mesh
    flops: int
    compile_seconds: float

    def run(self) -> StepMetrics:
        """Run a step, and wait for it. The step uses its state up and gives the next."""
        with jax.set_mesh(self.mesh):
            self.args[0], metrics = self.compiled(*self.args)
        return jax.block_until_ready(metrics)

    def time(self) -> tuple[float, StepMetrics]:
        """Return (median seconds of a step after the first, the metrics of the last)."""
        seconds: list[float] = []
        while len(seconds) <= ROUNDS and (len(seconds) < 2 or sum(seconds) < LONG):
            began = time.monotonic()
            metrics = self.run()
            seconds.append(time.monotonic() - began)
        return statistics.median(seconds[1:]), metrics


def state_bytes(cfg: TrainConfig, manifest: bundle.Manifest, mesh: Mesh) -> int:
    """Count the bytes on a device of parameters and optimizer state. Raises ValueError,
    BundleError."""
    task = task_without_data(cfg, manifest, mesh)
    return sharding.placed_bytes((task.abstract, task.frozen))


def training_program(
    cfg: TrainConfig, manifest: bundle.Manifest, mesh: Mesh, size: tuple[int, int]
) -> TrainingProgram:
    """Compile the training step for a bucket of `size` (height, width) pixels, and fill its
    arguments with random numbers. Raises ValueError, BundleError."""
    task = task_without_data(cfg, manifest, mesh)
    abstract = abstract_samples(task, size)
    frozen = Networks(task.frozen, {})
    options = xla_flags.compiler_options(mesh.devices.flat[0], True) if mesh.size > 1 else None
    with jax.set_mesh(mesh), sampler.precision(cfg.dtype):
        began = time.monotonic()
        lowered = jit_train_step(task).lower(task.abstract, frozen, abstract, RATE)
        step = lowered.compile(compiler_options=options)
        compiling = time.monotonic() - began
        check_fits("the arrays of a training step", program_bytes(step))
        now = state.with_params(cfg, task.model, task.tx, mesh, filled(task.abstract.params))
        args = [now, filled(frozen), filled(abstract, 1.0), jnp.float32(LEARNING_RATE)]
    cost = task.sample_cost(task.schedule, abstract, abstract.target.shape[2:4])
    return TrainingProgram(step, args, mesh, step_flops(cfg, cost), compiling)


def measure_training(work: Workload, cfg: TrainConfig, mesh: Mesh) -> Result:
    """Measure a training step of random weights, whatever weights the bundle has."""
    check_fits("parameters and optimizer state", state_bytes(cfg, work.manifest, mesh))
    program = training_program(cfg, work.manifest, mesh, work.layout.canvas)
    seconds, _ = program.time()
    size = program_bytes(program.compiled)
    return Result(
        seconds, program.compile_seconds, flops=program.flops, memory=size, batch=cfg.batch
    )


def training_setup(
    work: Workload, trainable: Trainable, mesh: str | None
) -> tuple[TrainConfig, Mesh]:
    """Return the smallest training that a mesh divides, by default that of `framepack train`.
    Raises ValueError."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    if work.pipe.dtype != dtype:
        dtype = "bfloat16"
    cfg = TrainConfig(bundle=work.name, trainable=trainable, batch=1, dtype=dtype)
    devices = jax.local_devices()
    sizes = sharding.parse_mesh(mesh) if mesh else default_mesh(cfg, work.manifest, devices)
    grid = sharding.make_mesh(**sizes, devices=devices)
    return dataclasses.replace(cfg, batch=grid.shape["data"] * grid.shape["fsdp"]), grid
