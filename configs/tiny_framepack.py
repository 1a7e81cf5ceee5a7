"""Train the transformers of the tiny bundles (3.3 million parameters) on the demo world.

Command:  make tiny-bundle runs every step; those with this file are
          python train.py --config configs/tiny_framepack.py --init scratch --steps 4500
              --data.path outputs/world/sketches_dataset --output outputs/world/sketch
          python train.py --config configs/tiny_framepack.py
          python train.py --config configs/tiny_framepack.py --init outputs/world/f1 --steps 3000
              --output outputs/world/f1_more
          python train.py --config configs/tiny_framepack.py --init outputs/world/f1_more
              --steps 600 --schedule f1k1_x_g9_f1k1f2k2f16k4_td --output outputs/world/inverted
Hardware: two CPU cores; a step takes 0.42 s at 64x64 and 1.6 s at 128x128 on an idle machine.
Result:   docs/training.md, "The tiny bundle": the first run learns captions from many small first
          sections, where a step is four times cheaper. The second learns sizes, details and later
          sections, and the third continues it. The last learns the inverted order.
"""

from framepack_jax import packing
from framepack_jax.data.config import DataConfig
from framepack_jax.training.config import (
    CheckpointConfig,
    NoiseSchedule,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)


def get_config() -> TrainConfig:
    """Forward order. The guidance input has the default value of sampling."""
    return TrainConfig(
        bundle="outputs/world/vae/bundle",
        output="outputs/world/f1",
        init="outputs/world/sketch",
        data=DataConfig(
            path="outputs/world/dataset", holdout=32, sections="random", caption_dropout=0.1,
            text_tokens=48,
        ),
        schedule=packing.RELEASED_F1,
        guidance=10.0,
        batch=16,
        steps=1800,
        optimizer=OptimizerConfig("muon", learning_rate=3e-3, warmup_steps=30, schedule="cosine"),
        noise_schedule=NoiseSchedule(mu=1.0, high=0.15),
        dtype="float32",
        remat="none",
        ema=0.99,
        validation=ValidationConfig(
            every=1800, samples=32, sigmas=(0.3, 0.6, 0.9), sections=2, steps=10
        ),
        checkpoints=CheckpointConfig(every=100),
    )  # fmt: skip
