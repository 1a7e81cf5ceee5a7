"""Noise levels of recipes against the schedulers of diffusers."""

import numpy as np
import pytest
from diffusers import HeliosDMDScheduler, HeliosScheduler, UniPCMultistepScheduler

from framepack_jax.diffusion.recipe import Levels, Recipe

COUNTS = (1, 2, 3, 10, 50)


def assert_same(levels: Levels, scheduler, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(levels.sigmas, np.asarray(scheduler.sigmas), atol=tolerance)
    times = levels.sigmas[:-1] if levels.times is None else levels.times
    theirs = np.asarray(scheduler.timesteps, np.float64)
    np.testing.assert_allclose(1000 * times, theirs, atol=1000 * tolerance)


def mu_of(tokens: int) -> float:
    return 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)


@pytest.mark.parametrize("steps", COUNTS)
def test_one_stage_with_a_shift_by_tokens(steps: int) -> None:
    scheduler = HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    sigmas = np.linspace(0.999, 0.0, steps + 1)[:-1]
    scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu_of(8640))
    recipe = Recipe(solver="unipc-flow", highest=0.999, max_shift=None)
    assert_same(recipe.levels(steps, 8640), scheduler)


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("shift", ["none", "tokens"])
def test_three_stages(steps: int, stage: int, shift: str) -> None:
    scheduler = HeliosScheduler(use_dynamic_shifting=shift == "tokens")
    scheduler.set_timesteps(steps, stage, mu=mu_of(2160))
    recipe = Recipe(solver="unipc-flow", shift=shift, max_shift=None, stages=3)
    assert_same(recipe.levels(steps, 2160, stage), scheduler)


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("shift", ["none", "tokens"])
def test_distilled(steps: int, stage: int, shift: str) -> None:
    scheduler = HeliosDMDScheduler(use_dynamic_shifting=shift == "tokens", time_shift_type="linear")
    scheduler.set_timesteps(steps, stage, mu=mu_of(2160))
    recipe = Recipe(solver="renoise", shift=shift, max_shift=None, exponential=False, stages=3)
    assert_same(recipe.levels(steps, 2160, stage), scheduler)


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("factor", [3.0, 5.0])
def test_a_fixed_shift(steps: int, factor: float) -> None:
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=factor
    )
    scheduler.set_timesteps(steps)
    recipe = Recipe(
        solver="unipc-flow", lowest=0.001, shift="fixed", shift_factor=factor, whole_times=True
    )
    assert_same(recipe.levels(steps, 8640), scheduler)


def test_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="steps is 0; a sampler needs at least 1"):
        Recipe(stages=3).levels(0, 100)
