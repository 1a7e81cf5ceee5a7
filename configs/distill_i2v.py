"""Distill the released FramePack-I2V to four steps of sampling, as a LoRA.

Command:  python train.py --config configs/distill_i2v.py --bundle weights/framepack_i2v_hy
              --data.path datasets/mine --output runs/four_steps
          framepack sample --bundle weights/framepack_i2v_hy --lora runs/four_steps --steps 4
              --sampler euler --image photo.jpg --prompt "..."
Hardware: 8 x H100. Not yet compiled: python scripts/dry_runs.py --training "distill h100:8"
Expect:   validation videos are sampled in four steps; compare them with 25 steps of the released
          model. Not yet trained at this size; all settings are our choice.
"""

from framepack_jax.data.config import DataConfig
from framepack_jax.training.config import (
    CheckpointConfig,
    DistillConfig,
    HistoryConfig,
    LoRAConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)


def get_config() -> TrainConfig:
    """Adapters, so that the teacher takes no memory. The guidance input has the default value of
    sampling; in every second step the student reads history of its own."""
    return TrainConfig(
        bundle="framepack_i2v",
        data=DataConfig(holdout=8),
        trainable="lora",
        lora=LoRAConfig(rank=64, alpha=64.0),
        distill=DistillConfig(steps=4, teacher_steps=24),
        history=HistoryConfig(rollouts=0.5),
        guidance=10.0,
        batch=32,
        steps=3000,
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100),
        remat="full",
        validation=ValidationConfig(every=250, samples=16, videos=1),
        checkpoints=CheckpointConfig(every=250, keep=4),
    )
