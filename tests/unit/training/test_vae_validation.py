"""Validation of a VAE on held-out videos."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from framepack_jax import video
from framepack_jax.data.pixel_batch import signed
from framepack_jax.data.vae_clips import find_videos, read_clip
from framepack_jax.models.hunyuan import vae
from framepack_jax.models.hunyuan.spec import VAE
from framepack_jax.training.vae_validation import validate

SMALL = vae.VaeConfig(
    channels=(4, 8), layers_per_block=1, norm_groups=2, space_compression=4, time_compression=2
)


def psnr(params, clip: np.ndarray) -> float:
    """PSNR in dB of a clip (T, H, W, 3) uint8."""
    x = signed(jnp.asarray(clip[None]))
    mean, _ = vae.encode(SMALL, params, x)
    made = np.clip(vae.decode(SMALL, params, mean), -1, 1)
    return 10 * np.log10(4 / np.square(made - x).mean())


def test_clips_and_their_first_frames_alone_are_measured(tmp_path) -> None:
    """Of the middle of two videos, the first frames of which are unlike those that follow."""
    rng = np.random.default_rng(0)
    for name, light in (("a", 250), ("b", 120)):
        frames = np.full((9, 16, 24, 3), 20, np.uint8)
        frames[:3] = light
        frames += rng.integers(0, 5, frames.shape, np.uint8)
        video.write_mp4(tmp_path / f"{name}.mp4", list(frames), fps=30, crf=1)
    held = find_videos(tmp_path, 5, (16, 24))
    params = VAE.init(SMALL, jax.random.key(0))
    found = validate(VAE, SMALL, params, held, 5, epath.Path(tmp_path), 7)
    clips = [read_clip(each, 2, 5) for each in held]
    whole, still = ([psnr(params, clip[:n]) for clip in clips] for n in (5, 1))
    assert found == pytest.approx(
        {
            "held_out/psnr": np.mean(whole), "held_out/least_psnr": min(whole),
            "held_out/still_psnr": np.mean(still),
        },
        rel=1e-4,
    )  # fmt: skip
    assert (tmp_path / "validation" / "step_0000007.png").exists()
