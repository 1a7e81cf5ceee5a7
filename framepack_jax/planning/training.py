"""Dry run of training: compile the real training step for a machine that is not present.

As for sampling, memory and collectives come from the compiler, FLOPs from the config, and the
roofline from vendor figures.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from framepack_jax import bundle, packing
from framepack_jax.data.batch import Batch, Conditions, Meta
from framepack_jax.diffusion import sampler
from framepack_jax.packing import Timeline
from framepack_jax.parallel import hardware, sharding
from framepack_jax.parallel.hardware import Machine
from framepack_jax.parallel.sharding import BATCH
from framepack_jax.planning.hlo import Traffic
from framepack_jax.planning.programs import GB, Program, compile_program
from framepack_jax.planning.report import StepReport, flag_lines
from framepack_jax.planning.sampling import image_tokens
from framepack_jax.training import state
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.default_mesh import default_mesh
from framepack_jax.training.flow_matching_task import (
    FlowMatchingTask,
    Networks,
    schedule_of,
    set_up,
)
from framepack_jax.training.metrics import COST
from framepack_jax.training.task import Cost
from framepack_jax.training.train_step import RATE, jit_train_step


@dataclasses.dataclass(frozen=True)
class TrainingReport(StepReport):
    """Memory of a training step on each chip of a machine, in bytes.

    `state` includes the trained parameters, the optimizer state and the moving average; `frozen` is
    the size of the other weights, with those of a teacher.
    """

    cfg: TrainConfig
    parameters: int
    trained: int
    state: int
    frozen: int
    program: Program
    tokens: int

    @property
    def total(self) -> int:
        """Return the bytes on a chip while a step runs."""
        return self.program.arguments + self.program.temporaries + self.program.outputs

    @property
    def collectives(self) -> dict[str, Traffic]:
        return self.program.collectives

    @property
    def kernels(self) -> dict[str, int]:
        return self.program.kernels

    def __str__(self) -> str:
        cfg, program = self.cfg, self.program
        parts = f" in {cfg.grad_accum_steps} parts" if cfg.grad_accum_steps > 1 else ""
        rate = f", {cfg.batch / self.roofline_seconds:.2f} samples/s"
        lines = [
            self.heading(),
            f"parameters       {self.parameters:,} of the transformer, {self.trained:,} trained by"
            f" {cfg.optimizer.name}",
            f"batch            {cfg.batch} samples of {self.tokens:,} tokens{parts}, remat"
            f" {cfg.remat}, {cfg.dtype}",
            f"state a chip     {self.state / GB:.2f} GB trained, with optimizer and averages;"
            f" {self.frozen / GB:.2f} GB frozen",
            str(program),
            f"{self.memory()}: {self.verdict(program.advice)}",
            *self.compute(", without what remat computes again", rate),
        ]
        lines += self.exchange()
        if program.reduced:
            sizes = sorted(program.reduced.items(), key=lambda item: -item[1])
            shown = ", ".join(f"{size / GB:.3f} GB in {element}" for element, size in sizes)
            lines.append(f"reduced          {shown}, by all-reduce and reduce-scatter")
        if self.step_seconds is not None and self.collectives:
            lines.append(
                f"step             {self.step_seconds:.3f} s,"
                f" {cfg.batch / self.step_seconds:.2f} samples/s, modelled: roofline and links"
            )
        return "\n".join([*lines, *flag_lines(program.flags)])


def dry_run_training(
    cfg: TrainConfig,
    bundle_path: epath.PathLike,
    machine: Machine,
    mesh: dict[str, int] | None = None,
    size: tuple[int, int] = (608, 640),
    chips: Sequence[jax.Device] | None = None,
) -> TrainingReport:
    """Compile the training step of a configuration for a machine, at a bucket of `size` pixels.

    `mesh` has the sizes of the mesh axes; default: `default_mesh`. `chips` are the
    devices of the machine; default: those of its compiler. Raises ValueError if the
    compiler is missing, or if the mesh does not divide the parameters.
    """
    manifest = bundle.read_manifest(bundle_path)
    chips = hardware.compile_devices(machine) if chips is None else chips
    sizes = mesh or default_mesh(cfg, manifest, chips)
    devices = sharding.make_mesh(**sizes, devices=chips)
    task = task_without_data(cfg, manifest, devices)
    batch = abstract_samples(task, size)

    def lower() -> jax.stages.Lowered:
        with sampler.precision(cfg.dtype):
            networks = Networks(task.frozen, {}, task.teacher)
            return jit_train_step(task).lower(task.abstract, networks, batch, RATE)

    advice = (
        "a smaller --batch, --grad-accum-steps, --remat full or more chips help, and"
        " --optimizer.name adam8bit or adafactor"
    )
    program = compile_program("step", advice, task.frozen, lower, devices, training=True)
    cost = task.sample_cost(task.schedule, batch, batch.target.shape[2:4])
    trained = sum(math.prod(p.shape) for p in jax.tree.leaves(task.abstract.params))
    frozen = sum(math.prod(p.shape) for p in jax.tree.leaves(task.frozen))
    _, own = state.partition_factors(task.abstract.params)
    base = frozen + sum(math.prod(p.shape) for p in jax.tree.leaves(own))
    return TrainingReport(
        machine=machine,
        mesh=dict(devices.shape),
        cfg=cfg,
        parameters=base,
        trained=trained,
        state=sharding.placed_bytes(task.abstract),
        frozen=sharding.placed_bytes((task.frozen, task.teacher)),
        program=program,
        flops=step_flops(cfg, cost),
        tokens=cost.tokens,
    )


def task_without_data(
    cfg: TrainConfig, manifest: bundle.Manifest, devices: Mesh
) -> FlowMatchingTask:
    """Set up a task on a mesh; the entries of a schedule with `+D` are zeros. Raises ValueError,
    BundleError."""
    task = set_up(cfg, manifest, devices)
    if entries := task.schedule.codebook:
        codebook = np.zeros((entries, len(manifest.latent_mean)), np.float32)
        task = dataclasses.replace(task, codebook=codebook)
    return task


def step_flops(cfg: TrainConfig, cost: Cost) -> int:
    """Count the FLOPs of a training step of a batch, without what remat computes again."""
    return round((cost.flops * COST[cfg.trainable] + cost.more_flops) * cfg.batch)


def sample_tokens(cfg: TrainConfig, manifest: bundle.Manifest, size: tuple[int, int]) -> int:
    """Count the tokens of a sample of a bucket of `size` (height, width) pixels."""
    configs = _configs(manifest)
    rows, columns = (side // configs["vae"].space_compression for side in size)
    schedule = schedule_of(cfg, manifest)
    packed = sum(tokens for _, tokens in packing.context_tokens(schedule, rows, columns))
    image = image_tokens(configs["image_encoder"]) if "image_encoder" in configs else 0
    return packed + packing.target_tokens(schedule, rows, columns) + manifest.text_tokens + image


def _configs(manifest: bundle.Manifest) -> dict[str, Any]:
    """Return the configs of the networks that training reads, by role."""
    roles = bundle.sampling_roles(manifest)
    return {name: bundle.role_config(manifest, name)[1] for name in roles}


def abstract_samples(task: FlowMatchingTask, size: tuple[int, int]) -> Batch:
    """Return a global batch of abstract latents for a bucket of `size` (height, width) pixels, with
    shardings, from the configs of the bundle's networks alone."""
    configs = _configs(task.manifest)
    compression, batch = configs["vae"].space_compression, task.cfg.batch
    frame = (*(side // compression for side in size), configs["vae"].latent_channels)
    # The longest pass is the first one of a video of one section, or of two.
    sections = len(packing.pass_frames(task.schedule))
    section = packing.plan(task.schedule, sections)[0]
    timeline = Timeline(packing.length([section]), frame)
    timeline.known[:] = True
    context = packing.read_context(section, timeline)
    where = NamedSharding(task.mesh, PartitionSpec(BATCH))

    # Returns Any, as abstract arrays stand for arrays in `Batch`.
    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct((batch, *sizes), dtype, sharding=where)

    number, tokens = shape(dtype=jnp.int32), task.manifest.text_tokens
    summary, vision = configs.get("text_encoder_2"), configs.get("image_encoder")
    return Batch(
        target=shape(len(section.targets), *frame),
        context=dataclasses.replace(
            context,
            latents=tuple(
                shape(*x.shape[1:], dtype=jnp.float32 if packing.tail_of(kernel) else jnp.bfloat16)
                for x, kernel in zip(context.latents, context.kernels, strict=True)
            ),
            indices=tuple(shape(*x.shape[1:], dtype=jnp.int32) for x in context.indices),
            target_indices=shape(len(section.targets), dtype=jnp.int32),
            masked=None if context.masked is None else shape(dtype=jnp.int32),
        ),
        given=tuple(shape(x.shape[1], dtype=jnp.bool_) for x in context.latents),
        conditions=Conditions(
            text=shape(tokens, configs["text_encoder"].width),
            text_valid=shape(tokens, dtype=jnp.bool_),
            pooled=None if summary is None else shape(summary.width),
            image=None if vision is None else shape(image_tokens(vision), vision.width),
        ),
        meta=Meta(number, number, number, number),
    )  # fmt: skip
