"""Full fine-tuning of Helios-Base (forward, anchored, window 9, sections decoded alone).

Command:  framepack convert --helios base --output weights/helios_base
          framepack prepare --videos clips/ --bundle weights/helios_base --output datasets/mine
          python train.py --config configs/finetune_helios.py --bundle weights/helios_base
              --data.path datasets/mine --output runs/helios [--mesh data=2,fsdp=16]
              [--coordinator-address auto]
Hardware: TPU v5p-64 (32 chips): 37 of 95 GB a chip by its compiler, and 2.6 s a step modelled
          (--dry-run v5p-64 --dry-run-size 384x640, data=2,fsdp=16). Not run on a TPU.
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
    """History as in the release (arXiv 2603.04379): dropped for text-to-video, and corrupted."""
    return TrainConfig(
        bundle="helios_14b",
        data=DataConfig(holdout=32),
        batch=32,
        steps=10_000,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=500),
        noise_schedule=NoiseSchedule(mu=0.0),
        history=HistoryConfig(drop_all=0.4, drop_oldest=0.4, corrupt=1 / 3, clean=0.1),
        ema=0.999,
        remat="full",
        validation=ValidationConfig(every=500, samples=32, videos=1),
        checkpoints=CheckpointConfig(every=500, keep=2, keep_every=2500),
    )
