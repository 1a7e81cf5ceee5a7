"""Stages of growing resolution: sizes, noise and its correlation."""

import itertools

import numpy as np
import pytest
from einops import rearrange

from framepack_jax.diffusion import pyramid

SHAPE = (1, 4, 64, 64, 16)


def draw(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE, np.float32)


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
def test_block_noise_has_the_covariance_of_its_definition(gamma: float) -> None:
    blocks = rearrange(
        pyramid.block_noise(draw(), gamma), "b t (h ph) (w pw) c -> (b t h w c) (ph pw)", ph=2, pw=2
    )
    expected = (1 + gamma) * np.eye(4) - gamma
    # 65,536 blocks: the standard error of a covariance is about 0.006.
    np.testing.assert_allclose(np.cov(blocks.T), expected, atol=0.025)


def test_noise_that_is_halved_stays_standard_noise() -> None:
    small = pyramid.shrink(draw(), 3)
    assert small.shape == (1, 4, 16, 16, 16)
    assert abs(small.std() - 1) < 0.02 and abs(small.mean()) < 0.05
    np.testing.assert_allclose(small[0, 0, 0, 0], draw()[0, 0, :4, :4].sum((0, 1)) / 4, rtol=1e-4)


def test_a_stage_begins_with_the_variance_of_its_first_noise_level() -> None:
    """The start of a stage lies on the path x = (1 - s) x0 + s noise: what is left of the latents
    and the noise of equal cells add up as if noise of the whole grid had been added."""
    first, second, _ = pyramid.stages(3, 1 / 3)
    assert first.keep == 1 and first.renew == 0
    # The released figures: corrected start 0.7998, uncorrected 0.6663.
    assert 1 - second.keep * (1 - 0.666333) == pytest.approx(0.7998, abs=1e-4)
    noise = np.repeat(np.repeat(draw(1)[:, :, ::2, ::2], 2, 2), 2, 3)
    made = 0.666333 * second.keep * noise + second.renew * pyramid.block_noise(draw(2), 1 / 3)
    cells = rearrange(made, "b t (h ph) (w pw) c -> (b t h w c) (ph pw)", ph=2, pw=2)
    covariance = np.cov(cells.T)
    np.testing.assert_allclose(covariance, 0.7998**2 * np.eye(4), atol=0.02)


def test_times_fall_from_stage_to_stage() -> None:
    stages = pyramid.stages(3, 1 / 3)
    # diffusers' scheduler has 999, 743.256 and 385.614 of 1000.
    assert [1000 * s.first for s in stages] == pytest.approx([999.0, 743.256, 385.614], abs=1e-3)
    for before, after in itertools.pairwise(stages):
        assert before.first > before.last > after.first


def test_latents_are_repeated() -> None:
    latents = draw()[:, :, :2, :3]
    stage = pyramid.Stage(1.0, 0.5, 1.0, 0.0)
    large = pyramid.enlarge(latents, np.zeros((1, 4, 4, 6, 16), np.float32), stage)
    np.testing.assert_array_equal(
        large[:, :, 2:4, 4:6], np.tile(latents[:, :, 1:, 2:], (1, 1, 2, 2, 1))
    )


def test_sizes_that_cannot_be_halved_are_named() -> None:
    pyramid.check_size(48, 80, 3)
    with pytest.raises(
        ValueError, match="48 x 84 cells: a pyramid of 3 stages needs multiples of 8"
    ):
        pyramid.check_size(48, 84, 3)
