"""The VAE of the demo world: the real architecture at small widths, 2.0 million parameters.

Command:  make tiny-bundle, which has every step; those that this file is for are
          framepack train-vae --config configs/tiny_vae.py
          framepack train-vae --config configs/tiny_vae.py --output outputs/tiny/vae
              --init outputs/tiny/stills --frames 17 --batch 4 --steps 1000
Hardware: two CPU cores; a step of either took 1 to 2 s there.
Result:   500 steps of the first, of single frames, give back the frames of 16 held-out videos at
          31.95 dB, the worst at 26.9. The second, which teaches it motion, has not been run yet;
          beginning with clips of 17 frames instead is slow: 21 dB after 360 steps.
"""

from framepack_jax.training.config import Optimizer
from framepack_jax.training.vae import Config


def get_config() -> Config:
    """8x in space, 4x in time, 16 channels, as the released VAE has them."""
    return Config(
        videos="outputs/tiny/footage",
        bundle="outputs/tiny/encoders",
        output="outputs/tiny/stills",
        init="scratch",
        network={"channels": (8, 16, 32, 64), "layers_per_block": 1, "norm_groups": 4},
        frames=1,
        size=(64, 64),
        batch=32,
        steps=700,
        optimizer=Optimizer(learning_rate=2e-3, schedule="cosine", weight_decay=0.0),
    )
