"""Train a toy FramePack model from random weights, in minutes.

Command:  framepack synthetic --output outputs/videos --clips 256 --seconds 6 --size 64x96
          framepack prepare --videos outputs/videos --bundle random --output outputs/dataset
              --buckets 64x96
          python train.py --config configs/tiny.py
Hardware: two CPU cores; a step takes about 1.2 s. With --clips 16, --data.holdout 4,
          --validation.samples 8 and --steps 20 all three commands take two minutes.
"""

from framepack_jax.data.config import DataConfig
from framepack_jax.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)


def get_config() -> TrainConfig:
    """The VAE has random weights: the model learns how latents move, and its videos show nothing of
    interest."""
    return TrainConfig(
        bundle="random",
        output="outputs/tiny",
        init="scratch",
        network={
            "heads": 4, "head_dim": 32, "double_layers": 2, "single_layers": 4,
            "refiner_layers": 1, "rope_axes": (8, 12, 12),
        },
        data=DataConfig(path="outputs/dataset", holdout=64),
        batch=8,
        steps=500,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, schedule="cosine"),
        dtype="float32",
        remat="none",
        ema=0.99,
        validation=ValidationConfig(every=500, samples=192, steps=10, guidance=1.0),
        checkpoints=CheckpointConfig(every=100),
    )  # fmt: skip
