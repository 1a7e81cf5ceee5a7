"""Corruption of history by down- and upsampling, against torch."""

import functools

import jax.numpy as jnp
import numpy as np
import torch

from framepack_jax.training.history import resampled


def test_frames_are_resampled_as_by_torch() -> None:
    interpolate = functools.partial(torch.nn.functional.interpolate, mode="bilinear")
    x = np.random.default_rng(0).standard_normal((3, 2, 12, 20, 4)).astype(np.float32)
    scales = np.asarray([0.905, 0.96, 0.9999], np.float32)
    found = np.asarray(resampled(jnp.asarray(x), jnp.asarray(scales)))
    for sample, scale, ours in zip(x, scales, found, strict=True):
        frames = torch.from_numpy(sample).permute(0, 3, 1, 2)
        smaller = interpolate(frames, size=(int(12 * scale), int(20 * scale)))
        theirs = interpolate(smaller, size=(12, 20)).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(found - x).max() > 0.1
