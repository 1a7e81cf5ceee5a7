"""Lines that describe a run before its first step: data, parameters, batch, steps."""

import math
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from framepack_jax.data.loader import Loader
from framepack_jax.generation.offload_plan import limit_of_device
from framepack_jax.parallel.chips import chip_of
from framepack_jax.parallel.sharding import placed_bytes
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.programs import Programs
from framepack_jax.training.state import Params, TrainState, factor_scale, partition_factors
from framepack_jax.training.task import Frozen
from framepack_jax.utils.messages import bytes_text

if TYPE_CHECKING:
    from framepack_jax.training.flow_matching_task import FlowMatchingTask

# Adapters are usually scaled by about 1.
MAX_FACTOR_SCALE = 4


def data_line(what: str, held: int, epochs: float) -> str:
    """Clips or videos to train on, the number held out for validation, and the epochs of a run."""
    return f"data         {what}, {held:,} more held out; {epochs:.3g} epochs in the whole run"


def clips_text(counts: dict[tuple[int, int], int]) -> str:
    """Clips by bucket, for a `data_line`."""
    each = ", ".join(f"{height}x{width}: {count:,}" for (height, width), count in counts.items())
    buckets = f"{len(counts)} bucket{'s' * (len(counts) > 1)}"
    return f"{sum(counts.values()):,} clips in {buckets} ({each})"


def data_lines(loader: Loader, steps: int) -> list[str]:
    """Clips, share and epochs of each dataset, and its clips in buckets that are too small to train
    on."""
    lines, least = [], loader.cfg.min_clips
    weights = loader.schedule.weights
    for dataset, weight in zip(loader.datasets, weights, strict=True):
        share = weight / sum(weights)
        which = f"{dataset.folder}: " if len(weights) > 1 else ""
        part = f"; {share:.3g} of the batches" if len(weights) > 1 else ""
        counts = {bucket: len(numbers) for bucket, numbers in dataset.streams.items()}
        epochs = steps * loader.batch * share / dataset.clips
        lines.append(data_line(f"{which}{clips_text(counts)}{part}", len(dataset.held), epochs))
        small = {b: len(n) for b, n in dataset.by_bucket.items() if b not in counts}
        if small:
            text = f"{clips_text(small)} with fewer than {least} (--data.min-clips)"
            lines.append(f"left out     {which}{text}")
    return lines


def trained_line(trained: int, count: int) -> str:
    """Numbers of trained parameters and of all parameters."""
    return f"trained      {trained:,} of {count:,} parameters"


def batch_line(batch: int, parts: int, mesh: Mesh) -> str:
    """Samples of a step, over all devices and on one."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    each = f"{batch // ways} on each of {ways} devices"
    if ways < mesh.size:
        each = f"{batch // ways} on each of {ways} groups of {mesh.size // ways} devices"
    where = "on one device" if mesh.size == 1 else f"in all, {each}"
    return f"batch        {batch} samples {where}{f', in {parts} parts' if parts > 1 else ''}"


def steps_line(first: int, steps: int, saves: int, validates: int, why_not: str) -> str:
    """The steps of a run, and those of its first checkpoint and validation; `validates` is 0 for no
    validation, because of the flag `why_not`."""

    def after(every: int) -> int:
        return min((first // every + 1) * every, steps)

    validation = f"no validation ({why_not})"
    if validates:
        validation = f"validation after step {after(validates):,}"
    return (
        f"steps        {first + 1:,} to {steps:,}; the first checkpoint comes after step"
        f" {after(saves):,}, {validation}"
    )


def held_bytes(state: TrainState[jax.ShapeDtypeStruct], frozen: Frozen) -> dict[str, int]:
    """Return the bytes on a device of each part of a run that stays there, from shapes and
    shardings."""
    parts = {
        "parameters": state.params, "optimizer": state.opt_state, "moving average": state.ema,
        "frozen weights": frozen,
    }  # fmt: skip
    return {name: placed_bytes(tree) for name, tree in parts.items()}


def state_memory_line(state: TrainState[jax.ShapeDtypeStruct], frozen: Frozen) -> str:
    """Memory of what stays on a device."""
    held = {name: size for name, size in held_bytes(state, frozen).items() if size}
    parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in held.items())
    return f"state        {bytes_text(sum(held.values()))} on each device: {parts}"


def step_memory_line(programs: Programs) -> str | None:
    """Memory of a device while a step runs, by the compiler, for the largest program; None if it
    does not say."""
    found = [program.memory_analysis() for program, _ in programs.values()]
    sizes = [
        (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
         memory.temp_size_in_bytes)
        for memory in found if memory is not None
    ]  # fmt: skip
    if not sizes:
        return None
    held, temporary = max(sizes, key=sum)
    chip = chip_of(jax.local_devices()[0])
    room = limit_of_device() or (chip and chip.memory)
    return (
        f"memory       {bytes_text(held + temporary)}{f' of {bytes_text(room)}' if room else ''} on"
        f" each device in a step: state, weights and batch {bytes_text(held)}, temporary"
        f" {bytes_text(temporary)}"
    )


def lora_warning(cfg: TrainConfig) -> str | None:
    """A warning if alpha / rank is far from 1."""
    scale = factor_scale(cfg)
    if 1 / MAX_FACTOR_SCALE <= scale <= MAX_FACTOR_SCALE:
        return None
    return (
        f"warning: --lora.rank {cfg.lora.rank} with --lora.alpha {cfg.lora.alpha:g} multiplies"
        f" adapters, and so their learning rate, by {scale:g}; --lora.alpha {cfg.lora.rank} makes"
        " it 1"
    )


def _trained(cfg: TrainConfig, trained: Params, frozen: Params) -> str:
    factors, whole = partition_factors(trained)
    count, own, rest = (
        sum(math.prod(x.shape) for x in jax.tree.leaves(p)) for p in (factors, whole, frozen)
    )
    if cfg.trainable != "lora":
        return trained_line(own, own + rest)
    adapters = f"in adapters of rank {cfg.lora.rank}, alpha {cfg.lora.alpha:g}"
    embeddings = f" and {own:,} of embeddings" if own else ""
    return f"trained      {count:,} parameters {adapters}{embeddings}, beside {rest:,} frozen ones"


def _distilled(cfg: TrainConfig) -> str | None:
    if not (steps := cfg.distill.steps):
        return None
    return f"distilled    {cfg.distill.teacher_steps} steps of sampling to {steps}"


def run_lines(task: "FlowMatchingTask", first: int) -> list[str]:
    """Describe a run that trains a transformer, from the step after `first`."""
    cfg = task.cfg
    lines = [
        *data_lines(task.loader, cfg.steps),
        _trained(cfg, task.abstract.params, task.frozen),
        _distilled(cfg),
        batch_line(cfg.batch, cfg.grad_accum_steps, task.mesh),
        steps_line(
            first,
            cfg.steps,
            cfg.checkpoints.every,
            cfg.validation.every if task.validates else 0,
            "--validation.every 0" if cfg.data.holdout else "--data.holdout 0",
        ),
        lora_warning(cfg),
    ]
    return [line for line in lines if line]
