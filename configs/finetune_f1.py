"""Full fine-tuning of the released FramePack-F1 (forward, anchored, window 9).

Command:  python train.py --config configs/finetune_f1.py --bundle weights/framepack_f1_i2v_hy
              --data.path datasets/mine --output runs/f1 [--mesh data=2,fsdp=16]
              [--coordinator-address auto]
Hardware: TPU v5p-64 (32 chips) or 8 x H100 (--mesh fsdp=8); both fit by their compilers, the GPUs
          up to --batch 40 (docs/measurements/memory.md).
Expect:   the loss of a released model starts near its minimum and changes little. Watch the
          validation videos, and context/*_other, which must stay above 0. Not yet run in full.
"""

from framepack_jax.data.config import DataConfig
from framepack_jax.training.config import (
    CheckpointConfig,
    HistoryConfig,
    NoiseSchedule,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)


def get_config() -> TrainConfig:
    """As finetune_i2v, with noise on the history, as sections read sampled sections."""
    return TrainConfig(
        bundle="framepack_f1",
        data=DataConfig(holdout=32, caption_dropout=0.1),
        batch=32,
        steps=10_000,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=500),
        noise_schedule=NoiseSchedule(high=0.15),
        guidance=1.0,
        history=HistoryConfig(noisy=0.1),
        ema=0.999,
        remat="full",
        validation=ValidationConfig(every=500, samples=32, videos=1),
        checkpoints=CheckpointConfig(every=500, keep=2, keep_every=2500),
    )
