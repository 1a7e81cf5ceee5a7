"""The patch VAE: its patches, its principal components, frames that stand alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax.models import patch_vae
from framepack_jax.models.patch_vae import PatchVaeConfig
from framepack_jax.models.tiling import Tiling

CFG = PatchVaeConfig(
    latent_channels=6, width=16, blocks=2, mlp_ratio=2, space_compression=4, time_compression=2
)
WHOLE = Tiling(frames=None)


def noise(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def params():
    """Random parameters, of which none is zero."""
    drawn = patch_vae.init(CFG, jax.random.key(0))
    leaves, tree = jax.tree.flatten(drawn)
    return jax.tree.unflatten(
        tree, [leaf + 0.2 * noise(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    )


def test_patches_hold_every_pixel_once() -> None:
    clip = np.arange(5 * 8 * 12 * 3).reshape(1, 5, 8, 12, 3)
    cells = patch_vae.patches(CFG, jnp.asarray(clip))
    assert cells.shape == (1, 3, 2, 3, 2 * 4 * 4 * 3)
    # Frames 1 and 2, rows 4 to 7, columns 8 to 11.
    np.testing.assert_array_equal(
        np.asarray(cells[0, 1, 1, 2]).reshape(2, 4, 4, 3), clip[0, 1:3, 4:8, 8:12]
    )
    # The first frame, repeated.
    first = np.asarray(cells[0, 0, 0, 0]).reshape(2, 4, 4, 3)
    np.testing.assert_array_equal(first, np.stack([clip[0, 0, :4, :4]] * 2))
    np.testing.assert_array_equal(patch_vae.pixels(CFG, cells), clip)


def test_every_frame_of_latents_stands_alone(params) -> None:
    clip = noise(2, 7, 8, 12, 3)
    mean, logvar = patch_vae.encode(CFG, params, clip, WHOLE)
    assert mean.shape == logvar.shape == (2, 4, 2, 3, 6)
    alone, _ = patch_vae.encode(CFG, params, clip[:, :1])
    np.testing.assert_allclose(alone, mean[:, :1], atol=1e-5)
    # Other frames behind, and other clips beside it, change nothing.
    other = clip.at[:, 3:].set(0).at[1].set(1)
    np.testing.assert_allclose(
        patch_vae.encode(CFG, params, other, WHOLE)[0][0, :2], mean[0, :2], atol=1e-5
    )
    video = patch_vae.decode(CFG, params, mean, WHOLE)
    assert video.shape == clip.shape
    np.testing.assert_allclose(
        patch_vae.decode(CFG, params, mean[:, :2], WHOLE), video[:, :3], atol=1e-5
    )


def test_chunks_of_time_give_the_whole_clip(params) -> None:
    clip = noise(1, 9, 8, 8, 3)
    whole, chunked = (
        patch_vae.encode(CFG, params, clip, tiling)[0] for tiling in (WHOLE, Tiling())
    )
    np.testing.assert_allclose(chunked, whole, atol=1e-5)
    whole, chunked = (
        patch_vae.decode(CFG, params, chunked, tiling) for tiling in (WHOLE, Tiling())
    )
    np.testing.assert_allclose(chunked, whole, atol=1e-5)


def test_neighbouring_cells_are_read(params) -> None:
    clip = noise(1, 1, 16, 16, 3)
    changed = clip.at[0, 0, 0, 0].add(1.0)
    moved = np.abs(
        patch_vae.encode(CFG, params, changed)[0] - patch_vae.encode(CFG, params, clip)[0]
    ).max(axis=(0, 1, 4))
    # Two blocks reach two cells far.
    assert (moved[:3, :3] > 0).all() and not moved[3].any() and not moved[:, 3].any()


def test_first_parameters_are_the_principal_components() -> None:
    # Clips of six patterns in each patch, with weights 6 to 1, about a mean.
    rng = np.random.default_rng(0)
    patterns = np.linalg.qr(rng.normal(size=(CFG.numbers, 6)))[0].T
    weights = rng.normal(size=(40, 3, 2, 3, 6)) * np.arange(6, 0, -1) + 0.5
    cells = jnp.asarray(weights @ patterns + rng.normal(size=CFG.numbers), jnp.float32)
    # The first patch is one frame, repeated; so are these.
    clips = patch_vae.pixels(CFG, cells)
    params = patch_vae.init(CFG, jax.random.key(0))
    params = patch_vae.fit(CFG, params, [np.asarray(clips[:20]), np.asarray(clips[20:])])
    mean, logvar = patch_vae.encode(CFG, params, clips, WHOLE)
    flat = np.asarray(mean).reshape(-1, 6)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(flat.T), np.eye(6), atol=1e-2)
    assert (np.asarray(logvar) == patch_vae.LOGVAR).all()


def test_what_components_leave_is_the_sum_of_the_others_variances() -> None:
    clips = np.asarray(noise(50, 1, 4, 4, 3))
    cfg = dataclasses.replace(CFG, latent_channels=20)
    params = patch_vae.fit(cfg, patch_vae.init(cfg, jax.random.key(0)), [clips])
    made = patch_vae.decode(cfg, params, patch_vae.encode(cfg, params, clips)[0])
    # Of the frame repeated, all variances double.
    variances = np.linalg.eigvalsh(np.cov(clips.reshape(50, -1).T, bias=True))[::-1]
    error = np.square(np.asarray(made) - clips).sum(axis=(1, 2, 3, 4)).mean()
    np.testing.assert_allclose(error, variances[20:].sum(), rtol=1e-3)


def test_a_preview_shows_the_mean_colours_of_the_linear_map(params) -> None:
    weight, bias = patch_vae.preview(CFG, params)
    z = np.asarray(noise(1, 1, 2, 3, 6))
    linear = params["decoder"]["linear"]
    cells = z @ np.asarray(linear["kernel"]) + np.asarray(linear["bias"])
    colours = cells.reshape(1, 1, 2, 3, -1, 3).mean(axis=4)
    np.testing.assert_allclose(z @ weight + bias, colours, atol=1e-5)


def test_clips_without_enough_directions_are_named() -> None:
    params = patch_vae.init(CFG, jax.random.key(0))
    still = np.broadcast_to(np.linspace(-1, 1, 5)[:, None, None, None, None], (5, 1, 4, 4, 3))
    with pytest.raises(ValueError, match="fewer than 6 directions"):
        patch_vae.fit(CFG, params, [still])


def test_bad_clips_are_named(params) -> None:
    with pytest.raises(ValueError, match="multiples of 4, got 6x8"):
        patch_vae.encode(CFG, params, jnp.zeros((1, 1, 6, 8, 3)))
    with pytest.raises(ValueError, match=r"latents must be \(B, T, H, W, 6\)"):
        patch_vae.decode(CFG, params, jnp.zeros((1, 1, 2, 2, 5)))
    with pytest.raises(ValueError, match="multiples of 4"):
        patch_vae.check_tiling(CFG, Tiling(size=6, stride=6))
