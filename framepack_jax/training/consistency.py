"""Distillation to few steps of sampling: multistep consistency (Heek et al., arXiv 2403.06807).

A grid of T + 1 noise levels falls from 1 to 0 as in sampling. The teacher, the network that the run
starts from, takes a step of Euler's method from each level to the next. The student takes N steps
over the same grid, T / N levels each. At a level sigma, whose student step ends at s, the teacher
goes to the next level sigma', and the student from there to s:

    x' = x + (sigma' - sigma) v_teacher(x, sigma)
    z  = x' + (s - sigma') v_student(x', sigma')          z = x' if sigma' = s

The student learns to reach z from x in one step: the velocity (z - x) / (s - sigma). No gradient
flows through z. So all levels of a student step come to agree on where the teacher's path ends.
Every step of a student is plain Euler, without the noise between steps of the paper's sampler.

The teacher computes no CFG: the released models are guidance-distilled, and teacher and student
read the same guidance input. Both read the same context.

Shapes: B batch, w latent window, h W latent rows and columns, C channels.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax import bundle
from framepack_jax.bundle import Sampling
from framepack_jax.data.batch import Batch
from framepack_jax.diffusion import flow
from framepack_jax.training.config import DistillConfig, NoiseSchedule, TrainConfig
from framepack_jax.training.flow_matching import (
    Examples,
    noise_of,
    section_tokens,
    spaced_quantiles,
)

# (x (B, w, h, W, C), sigmas (B,)) -> velocity, of the shape of x.
Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def student_sampling(cfg: TrainConfig, sampling: Sampling) -> Sampling:
    """Return how the student of a network with `sampling` is sampled: N steps of Euler's method at
    the levels of training, with the guidance input of training if that is one number. Without
    distillation, return `sampling`."""
    if not cfg.distill.steps:
        return sampling
    # Training tells the network its noise level as it is.
    recipe = dataclasses.replace(sampling.recipe, solver="euler", whole_times=False)
    if (mu := cfg.noise_schedule.mu) is not None:
        recipe = dataclasses.replace(recipe, shift="fixed", shift_factor=math.exp(mu))
    guidance = cfg.guidance
    if isinstance(guidance, tuple):
        guidance = sampling.distilled_guidance
    return dataclasses.replace(
        sampling, recipe=recipe, steps=cfg.distill.steps, distilled_guidance=guidance
    )


def noise_levels(cfg: TrainConfig, sampling: Sampling, shape: tuple[int, ...]) -> np.ndarray:
    """Return the grid (T + 1,) for sections of latents (B, w, h, W, C) of a network with
    `sampling`."""
    recipe = student_sampling(cfg, sampling).recipe
    return recipe.levels(cfg.distill.teacher_steps, section_tokens(shape)).sigmas


def draw_levels(levels: np.ndarray, key: jax.Array, elements: jax.Array, batch: int) -> jax.Array:
    """Draw the level (B,) at which each sample starts, all but the last being equally likely; those
    of a batch are evenly spaced over the grid `levels` (T + 1,). See `flow_matching.draw_sigmas`
    for the other arguments."""
    count = len(levels) - 1
    number = (spaced_quantiles(key, elements, batch) * count).astype(int)
    return jnp.asarray(levels, jnp.float32)[jnp.minimum(number, count - 1)]


def examples(
    teacher: Velocity,
    student: Velocity,
    levels: np.ndarray,
    steps: int,
    batch: Batch,
    keys: jax.Array,
    sigmas: jax.Array,
) -> Examples:
    """Return what a student of N = `steps` steps is to learn, at the levels of the grid `levels`
    (T + 1,) that are the nearest to `sigmas` (B,)."""
    jump = (len(levels) - 1) // steps
    grid = jnp.asarray(levels, jnp.float32)
    start = jnp.argmin(jnp.abs(grid[None, :-1] - sigmas[:, None]), axis=1)
    sigma, following, end = grid[start], grid[start + 1], grid[(start // jump + 1) * jump]
    x = flow.interpolate(batch.target, noise_of(batch, keys), sigma)
    z = _euler(teacher, x, sigma, following)
    if jump > 1:  # a step of no length where the teacher has reached the end
        z = _euler(student, z, following, end)
    return Examples(x, sigma, jax.lax.stop_gradient((z - x) / _over(x, end - sigma)))


def _euler(velocity: Velocity, x: jax.Array, sigma: jax.Array, to: jax.Array) -> jax.Array:
    """Take a step of Euler's method from the level sigma (B,) to another."""
    return x + _over(x, to - sigma) * velocity(x, sigma).astype(jnp.float32)


def _over(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """Return numbers (B,) with as many axes as x."""
    return numbers.reshape(-1, *[1] * (x.ndim - 1))


def more_passes(distill: DistillConfig) -> int:
    """Return the number of forward passes without a gradient for each sample: the teacher's, and
    the student's from the level after it, which is computed for all samples."""
    if not distill.steps:
        return 0
    return 1 if distill.steps == distill.teacher_steps else 2


def check(cfg: TrainConfig, manifest: bundle.Manifest) -> None:
    """Raise ValueError if there is no teacher as the configuration says, or if sampling could not
    be told how the student is sampled."""
    if not cfg.distill.steps:
        return
    adapters = cfg.trainable == "lora" and not cfg.lora.context
    levels = dataclasses.replace(cfg.noise_schedule, mu=None)
    _, config = bundle.denoiser_config(manifest)
    scale = manifest.sampling.cfg_scale
    contradictions = {
        "--init scratch: random weights are no teacher; give --init bundle or RUN@STEP": cfg.init
        == "scratch",
        f"--init {cfg.init}: the teacher is loaded again when the run resumes; name its step,"
        " RUN@STEP": cfg.trainable != "lora"
        and cfg.init not in ("bundle", "scratch")
        and not cfg.init.rpartition("@")[2].isdigit(),
        "--noise-schedule: levels are those of sampling, evenly drawn; of these settings only"
        " --noise-schedule.mu has an effect": levels != NoiseSchedule(),
        "--noise-schedule.mu and --trainable lora: adapters cannot tell sampling the shift, a"
        " bundle can; leave it out, or give --lora.context": adapters
        and cfg.noise_schedule.mu is not None,
        "--causal: the bundle, which is the teacher, is not causal; train it so first, and distill"
        " its bundle": cfg.causal and not config.causal,
        f"a bundle that is sampled with CFG (scale {scale:g}): a teacher is read without": scale
        != 1,
    }
    for contradiction, found in contradictions.items():
        if found:
            raise ValueError(f"--distill.steps {cfg.distill.steps} with {contradiction}")
