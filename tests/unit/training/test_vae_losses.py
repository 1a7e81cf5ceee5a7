"""The error of a VAE's reconstructions: pixels near edges, differences between neighbours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax.models import patch_vae
from framepack_jax.models.patch_vae import PatchVaeConfig
from framepack_jax.training import vae_losses
from framepack_jax.training.vae_config import VaeTrainConfig

PLAIN = VaeTrainConfig()


def test_pixels_near_an_edge() -> None:
    clip = np.zeros((1, 2, 12, 14, 3), np.float32)
    # An edge between columns 5 and 6 in rows 4 to 11, and between rows 3 and 4 from there on.
    clip[0, 1, 4:, 6:, 1] = 0.2
    near = np.asarray(vae_losses.near_edges(jnp.asarray(clip)))
    assert near.shape == (1, 2, 12, 14, 1) and not near[0, 0].any()
    expected = np.zeros((12, 14))
    expected[2:, 3:9] = 1  # three columns on each side, two rows above its end
    expected[1:7, 4:] = 1
    np.testing.assert_array_equal(near[0, 1, :, :, 0], expected)
    assert not np.asarray(vae_losses.near_edges(jnp.asarray(clip) * 0.7)).any()


def test_errors_by_hand() -> None:
    rng = np.random.default_rng(0)
    clip = np.zeros((1, 1, 8, 16, 3), np.float32)
    clip[..., 8:, :] = 1
    made = clip + rng.normal(size=clip.shape).astype(np.float32)

    def error(**fields):
        cfg = dataclasses.replace(PLAIN, **fields)
        return float(vae_losses.error_of(cfg, jnp.asarray(made), jnp.asarray(clip)))

    wrong = made - clip
    np.testing.assert_allclose(error(), np.square(wrong).mean(), rtol=1e-5)
    np.testing.assert_allclose(error(error="absolute"), np.abs(wrong).mean(), rtol=1e-5)
    weights = np.ones(16)
    weights[5:11] = 4
    weighted = (np.square(wrong) * weights[:, None]).sum() / (weights.sum() * 8 * 3)
    np.testing.assert_allclose(error(edge_weight=4.0), weighted, rtol=1e-5)
    differences = sum(np.abs(np.diff(wrong, axis=axis)).mean() for axis in (2, 3))
    np.testing.assert_allclose(
        error(gradient_error=0.5), np.square(wrong).mean() + 0.5 * differences, rtol=1e-5
    )


def test_noise_of_the_latents_reaches_the_decoder_alone() -> None:
    cfg = PatchVaeConfig(latent_channels=6, width=16, blocks=1)
    params = patch_vae.init(cfg, jax.random.key(0))
    clip = jax.random.normal(jax.random.key(1), (1, 1, 8, 8, 3))

    def found(noise):
        settings = dataclasses.replace(PLAIN, latent_noise=noise)
        return vae_losses.losses(patch_vae.SPEC, cfg, settings, params, clip, jax.random.key(2))

    without, little, much = found(0.0), found(0.1), found(10.0)
    assert without.kl == little.kl == much.kl
    assert without.squared < 0.1 * much.squared
    assert abs(little.squared - without.squared) < 0.1 * much.squared
    assert without.error == without.squared
