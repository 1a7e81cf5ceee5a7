"""A section in stages."""

import numpy as np
import pytest

from framepack_jax.diffusion import section
from framepack_jax.diffusion.sampler import Denoised


@pytest.mark.parametrize(
    ("bad", "first"),
    [
        ([-1, -1, -1], -1), ([0, -1, -1], 0), ([-1, 0, 1], 2), ([-1, -1, 0], 5), ([1, 0, 0], 1),
        ([-1, 2, -1], 4),
    ],
)  # fmt: skip
def test_the_first_step_that_is_not_finite_is_counted_over_all_stages(bad, first) -> None:
    """Stages of 2, 3 and 4 steps; the second sample is healthy."""
    stages = [Denoised(np.full((2, 1), n), np.array([step, -1]), None)
              for n, step in enumerate(bad)]  # fmt: skip
    joined = section._joined(stages, [2, 3, 4])
    assert joined.finite_step.tolist() == [first, -1]
    assert (joined.latents == 2).all() and joined.blocks_run is None


def test_runs_of_blocks_follow_one_another() -> None:
    ran = [np.ones((2, 1, 2), bool), np.zeros((3, 1, 2), bool)]
    stages = [Denoised(np.zeros((2, 1)), np.array([-1, -1]), each) for each in ran]
    joined = section._joined(stages, [2, 3])
    assert joined.blocks_run.shape == (5, 1, 2)
    assert joined.blocks_run.sum() == 4 and joined.blocks_run[:2].all()
