"""Train a tiny Wan transformer on the demo world, and a packed model that starts from it.

Command:  python -m benchmarks.history runs every step; those with this file are
          python train.py --config configs/tiny_wan.py
          python train.py --config configs/tiny_wan.py --bundle outputs/history/packed
              --steps 80 --output outputs/history/with
          python train.py --config configs/tiny_wan.py --bundle outputs/history/packed
              --steps 80 --output outputs/history/without --history.drop-all 1
Hardware: one CPU core.
Result:   docs/measurements/history.md. The first run trains plain Wan on single sections; the
          others continue from `framepack convert --from-base`, with and without history.
"""

from framepack_jax.data.config import DataConfig
from framepack_jax.training.config import (
    CheckpointConfig,
    NoiseSchedule,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)


def get_config() -> TrainConfig:
    """Noise levels of `from_wan.py`, optimizer and sizes of `tiny_framepack.py`."""
    return TrainConfig(
        bundle="outputs/history/untrained",
        output="outputs/history/base",
        data=DataConfig(path="outputs/history/dataset", holdout=64),
        batch=16,
        steps=300,
        optimizer=OptimizerConfig("muon", learning_rate=3e-3, warmup_steps=30, schedule="cosine"),
        noise_schedule=NoiseSchedule(mu=0.0),
        dtype="float32",
        remat="none",
        ema=0.99,
        validation=ValidationConfig(every=0),
        checkpoints=CheckpointConfig(every=100),
    )
