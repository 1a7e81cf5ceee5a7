"""Classifier-free guidance and its rescale: known answers, and diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from framepack_jax.diffusion.guidance import guide
from tests.fixtures.torch_reference import relative_error

RNG = np.random.default_rng(0)
POSITIVE = RNG.normal(0.3, 1.0, size=(2, 3, 4, 5, 16)).astype(np.float32)
NEGATIVE = RNG.normal(-0.1, 1.5, size=(2, 3, 4, 5, 16)).astype(np.float32)
NEGATIVE[1] *= 3


def test_scale_one_is_the_positive():
    for rescale in (0.0, 0.7, 1.0):
        out = guide(jnp.asarray(POSITIVE), jnp.asarray(NEGATIVE), 1.0, rescale)
        np.testing.assert_allclose(out, POSITIVE, atol=2e-6)


def test_scale_zero_is_the_negative():
    np.testing.assert_allclose(
        guide(jnp.asarray(POSITIVE), jnp.asarray(NEGATIVE), 0.0, 0.0), NEGATIVE, atol=1e-6
    )


def test_full_rescale_gives_each_sample_the_deviation_of_its_positive():
    out = np.asarray(guide(jnp.asarray(POSITIVE), jnp.asarray(NEGATIVE), 4.0, 1.0))
    for ours, positive in zip(out, POSITIVE, strict=True):
        assert ours.std() == pytest.approx(positive.std(), rel=1e-5)


@pytest.mark.parametrize("scale,rescale", [(2.5, 0.0), (2.5, 0.7), (7.0, 1.0)])
def test_equals_diffusers(scale, rescale):
    positive, negative = torch.from_numpy(POSITIVE), torch.from_numpy(NEGATIVE)
    theirs = rescale_noise_cfg(negative + scale * (positive - negative), positive, rescale)
    ours = guide(jnp.asarray(POSITIVE), jnp.asarray(NEGATIVE), scale, rescale)
    assert relative_error(ours, theirs) < 1e-6


def test_low_precision_predictions_are_combined_in_float32():
    half = jnp.asarray(POSITIVE, jnp.bfloat16)
    assert guide(half, half, 2.0, 0.5).dtype == jnp.float32
