"""--flow-shift: the noise levels of a run."""

import math

import numpy as np
import pytest

from framepack_jax.bundle import Sampling
from framepack_jax.diffusion import flow
from framepack_jax.generation.settings import Settings
from tests.fixtures.run_folders import HEIGHT, WIDTH, make

# Two latent frames of half as many tokens as latent pixels, each of 8 pixels.
TOKENS = 2 * (HEIGHT // 16) * (WIDTH // 16)


def test_noise_levels_are_shifted_by_the_factor() -> None:
    levels = Settings(flow_shift=3.0).recipe(Sampling()).levels(4, TOKENS)
    t = np.linspace(1, 0, 5)
    np.testing.assert_allclose(levels.sigmas, 3 * t / (1 + 2 * t), rtol=1e-12)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_a_factor_that_is_no_shift_is_named(shift: float) -> None:
    with pytest.raises(ValueError, match=r"flow_shift = .*: expected a number above 0"):
        Settings(flow_shift=shift)


def test_the_factor_of_the_size_gives_the_same_video(tmp_path) -> None:
    own = math.exp(flow.shift_mu(TOKENS))
    runs = {
        shift: make(tmp_path / str(shift), "--sections", 1, *flags).latents()
        for shift, flags in {
            None: (), own: ("--flow-shift", repr(own)), 7: ("--flow-shift", 7)
        }.items()
    }  # fmt: skip
    for position, latents in runs[None].items():
        np.testing.assert_allclose(runs[own][position], latents, atol=1e-5)
    assert not np.allclose(runs[7][1], runs[None][1], atol=1e-2)
