"""The VAE of the tiny bundle: the real architecture at small widths, on the demo world.

Command:  framepack synthetic --output outputs/world --clips 256 --seconds 10
          framepack train-vae --config configs/tiny_vae.py
"""

from framepack_jax.training.vae import Config


def get_config() -> Config:
    """8x in space, 4x in time, 16 channels, as the released VAE has them."""
    return Config(
        videos="outputs/world",
        bundle="tiny",
        output="outputs/tiny_vae",
        init="scratch",
        network={"channels": (8, 16, 32, 64), "layers_per_block": 1, "norm_groups": 4},
        size=(64, 64),
        batch=4,
        steps=2000,
    )
