"""Measure sampling: a denoising step, a section with all its steps, the decoding of a section."""

import contextlib
import dataclasses
import time
from typing import Any

import jax

from framepack_jax.bench.memory import check_fits
from framepack_jax.bench.result import Result
from framepack_jax.bench.timing import measured, program_bytes
from framepack_jax.bench.workload import Workload
from framepack_jax.diffusion import sampler
from framepack_jax.generation.results import NotFinite
from framepack_jax.parallel.multihost import fetch


def measure_step(work: Workload, weights: Any) -> Result:
    """Measure a denoising step: all passes of guidance through the network, and the solver."""
    pipe = work.pipe
    spec, cfg, _ = pipe.transformer
    program = sampler.StepProgram(spec, cfg, pipe.dtype)
    inputs, at, state = work.step_inputs()
    # As the sampler calls it, so that a section needs no other program.
    with pipe.on_mesh():
        memory = sampler.start_memory(program, weights, inputs, state.x)
        began = time.monotonic()
        lowered = sampler.step.lower(program, weights, inputs, at, state, memory)
        step = lowered.compile()
        compiling = time.monotonic() - began
        check_fits("the arrays of a denoising step", program_bytes(step))
        timing = measured(step, weights, inputs, at, state, memory)
    return Result(
        timing.seconds, compiling, flops=work.step_work().flops(), moved=_bytes(weights),
        memory=program_bytes(step),
    )  # fmt: skip


def measure_section(work: Workload, weights: Any) -> Result:
    """Measure a section as a video is sampled: context, noise, all steps, latents on the host."""
    network = work.pipe.transformer._replace(params=weights)
    pipe = dataclasses.replace(work.pipe, transformer=network)
    inputs, seeds = work.inputs(), range(work.batch)

    def run() -> None:
        # Random weights may overflow; the work is the same.
        with contextlib.suppress(NotFinite):
            made = pipe.sample(
                work.layout.plan, inputs, work.settings, seeds=seeds,
                timeline=work.timeline(done=False), done=work.number,
            )  # fmt: skip
            next(made)

    timing = measured(run)
    return Result(timing.seconds, _compiling(timing.first, timing.seconds), steps=work.steps)


def measure_decode(work: Workload, weights: Any) -> Result:
    """Measure the decoding of the clips of a section, without cross-fades and files."""
    pipe = dataclasses.replace(work.pipe, vae=work.pipe.vae._replace(params=weights))
    timeline = work.timeline(done=True)

    def run() -> list[jax.Array]:
        return fetch([pipe.start_clip(clip, timeline)[0] for clip in work.section.decode])

    timing = measured(run)
    compiling = _compiling(timing.first, timing.seconds)
    seconds = timing.seconds / (work.video_seconds * work.batch)
    return Result(seconds, compiling)


def _compiling(first: float, seconds: float) -> float:
    """Estimate the seconds of compiling from those of the first call."""
    return max(0.0, first - seconds)


def _bytes(tree: Any) -> int:
    """Return the bytes of arrays on one device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
