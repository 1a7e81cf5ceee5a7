"""Bad sizes and shapes of Wan's autoencoder."""

import jax.numpy as jnp
import pytest

from framepack_jax.models.tiling import Tiling
from framepack_jax.models.wan import vae
from framepack_jax.models.wan.vae_config import WanVaeConfig

CFG = WanVaeConfig()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: WanVaeConfig(halves_time=(True,)), "halves_time has 1 entries; 4 multipliers"),
        (lambda: WanVaeConfig(width=3, multipliers=(1, 3), halves_time=(True,)), "9 channels"),
        (lambda: vae.encode(CFG, {}, jnp.zeros((1, 1, 12, 16, 3))), "got 12x16"),
        (lambda: vae.encode(CFG, {}, jnp.zeros((1, 3, 1, 16, 16))), r"\(B, T, H, W, 3\)"),
        (lambda: vae.encode(CFG, {}, jnp.zeros((1, 0, 16, 16, 3))), "at least one frame"),
        (lambda: vae.decode(CFG, {}, jnp.zeros((1, 16, 1, 2, 2))), r"\(B, T, H, W, 16\)"),
        (lambda: vae.check_tiling(CFG, Tiling(size=60, stride=30)), "multiples of 8"),
    ],
)
def test_bad_input_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_compression_follows_the_steps():
    assert (CFG.space_compression, CFG.time_compression) == (8, 4)
    assert CFG.channels == (96, 192, 384, 384)
    cfg = WanVaeConfig(multipliers=(1, 2), halves_time=(False,))
    assert (cfg.space_compression, cfg.time_compression) == (2, 1)


def test_length_of_temporal_tiles_is_not_read():
    """Chunks are exact, so no length is wrong."""
    vae.check_tiling(CFG, Tiling(frames=5, frame_stride=3))
