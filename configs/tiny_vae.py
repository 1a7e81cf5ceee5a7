"""Train the VAE of the demo world: the full architecture at small widths, 2.0 million parameters.

Command:  make tiny-bundle runs every step; those with this file are
          framepack train-vae --config configs/tiny_vae.py
          framepack train-vae --config configs/tiny_vae.py --output outputs/world/vae
              --init outputs/world/stills --frames 17 --batch 4 --steps 350
              --optimizer.learning-rate 2e-4
Hardware: two CPU cores; a step of the first took 1.8 s, of the second 2.6 s.
Result:   700 steps of the first, on single frames, reconstruct the frames of 16 held-out videos at
          32.2 dB PSNR, the worst video at 27.6 dB. Inflated to clips of 17 frames, the PSNR is 31.4
          to 31.9 dB, and each latent gives the same picture four times. 350 steps of the second, at
          a learning rate of 2e-4, end at 31.6 dB. Without inflation, clips start at 27.5 dB; 360
          steps on clips from random weights reach 21 dB. A learning rate of 8e-4 destroys the
          pretrained weights.
"""

from framepack_jax.training.config import OptimizerConfig
from framepack_jax.training.vae_config import VaeTrainConfig


def get_config() -> VaeTrainConfig:
    """Compress 8x in space and 4x in time to 16 channels, as the released VAE."""
    return VaeTrainConfig(
        videos="outputs/world/footage",
        bundle="outputs/world/encoders",
        output="outputs/world/stills",
        init="scratch",
        network={"channels": (8, 16, 32, 64), "layers_per_block": 1, "norm_groups": 4},
        frames=1,
        size=(64, 64),
        batch=32,
        steps=700,
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", weight_decay=0.0),
    )
