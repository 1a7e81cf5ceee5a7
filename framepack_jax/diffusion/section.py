"""From noise to the latents of one section, by the recipe of a network: one stage, or a pyramid.

Shapes: B batch, w latent window, H W latent rows and columns, C channels.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from framepack_jax.diffusion import pyramid, sampler
from framepack_jax.diffusion.given_frames import GivenFrames
from framepack_jax.diffusion.history_noise import HistoryNoise
from framepack_jax.diffusion.network import Network
from framepack_jax.diffusion.recipe import Recipe
from framepack_jax.diffusion.sampler import Denoised, OnStep
from framepack_jax.diffusion.step_cache import StepCacheConfig


@dataclasses.dataclass(frozen=True, eq=False)
class SectionSettings:
    """Settings of a section's denoising.

    Args:
        steps: Steps of each stage of the recipe.
        solver: Name of the solver, if the recipe leaves it free.
        cfg_scale, cfg_rescale, dtype, cache: See `sampler.SamplerSettings`.
    """

    steps: tuple[int, ...]
    solver: str = "unipc"
    cfg_scale: float = 1.0
    cfg_rescale: float = 0.0
    dtype: str = "float32"
    cache: StepCacheConfig | None = None


def denoise(
    model: Network,
    cfg: Any,
    params: Any,
    recipe: Recipe,
    noise: Sequence[np.ndarray],
    settings: SectionSettings,
    context: Any,
    conditions: Any,
    negative: Any = None,
    negative_context: Any = None,
    *,
    patch: int = 2,
    given: GivenFrames | None = None,
    history_noise: HistoryNoise | None = None,
    on_step: OnStep | None = None,
) -> Denoised:
    """Run all steps of one section.

    `noise` is (B, w, H, W, C) of normal numbers, followed by block noise (`pyramid.block_noise`)
    for each further stage. Stages compute the same context at full size. The report of the steps is
    that of `sampler.denoise`, for the steps of all stages; so are the other arguments.

    Raises ValueError if the shapes of noise and given latents do not fit, or if the recipe has
    several stages and there are given latents.
    """
    parts = pyramid.stages(recipe.stages, recipe.gamma)
    if len(parts) > 1 and given is not None and np.any(given.mask):
        raise ValueError("a pyramid cannot keep given frames inside of a section")
    x = pyramid.shrink(np.asarray(noise[0], np.float32), len(parts))
    reports: list[Denoised] = []
    for stage, part in enumerate(parts):
        tokens = _tokens(x.shape, patch)
        if stage:
            x = pyramid.enlarge(x, noise[stage], part)
        done = sum(settings.steps[:stage])
        how = _settings(recipe, settings, tokens, stage, negative is not None)
        reports.append(
            sampler.denoise(
                model, cfg, params, x, how, context, conditions, negative, negative_context,
                given=given if len(parts) == 1 else None, history_noise=history_noise,
                on_step=on_step and functools.partial(_shifted, on_step, done),
            )
        )  # fmt: skip
        x = reports[-1].latents
    return _joined(reports, settings.steps)


def _settings(
    recipe: Recipe, settings: SectionSettings, tokens: int, stage: int, guided: bool
) -> sampler.SamplerSettings:
    steps = settings.steps[stage]
    levels = recipe.levels(steps, tokens, stage)
    still = np.arange(steps) < recipe.zero_steps * (stage == 0)
    return sampler.SamplerSettings(
        levels.sigmas, recipe.table(levels, settings.solver), settings.cfg_scale,
        settings.cfg_rescale, settings.dtype, settings.cache,
        times=levels.times,
        still=still if recipe.zero_star and guided else None,
    )  # fmt: skip


def _tokens(shape: tuple[int, ...], patch: int) -> int:
    """Return the tokens of latents (B, w, H, W, C)."""
    return shape[1] * (shape[2] // patch) * (shape[3] // patch)


def _shifted(on_step: OnStep, done: int, step: int, x0: jax.Array) -> None:
    on_step(done + step, x0)


def _joined(reports: Sequence[Denoised], steps: Sequence[int]) -> Denoised:
    """Return the latents of the last stage with the reports of all."""
    if len(reports) == 1:
        return reports[0]
    first_bad = np.full(len(reports[0].finite_step), -1)
    for done, report in reversed(list(zip(np.cumsum([0, *steps]), reports, strict=False))):
        first_bad = np.where(report.finite_step >= 0, done + report.finite_step, first_bad)
    ran = [report.blocks_run for report in reports if report.blocks_run is not None]
    return Denoised(reports[-1].latents, first_bad, np.concatenate(ran) if ran else None)
