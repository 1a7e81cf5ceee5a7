"""Train a LoRA for the released FramePack-I2V: a style, a motion, a person.

Command:  python train.py --config configs/lora_i2v.py --bundle weights/framepack_i2v_hy
              --data.path datasets/mine --output runs/lora
Hardware: 8 x A100-80G or H100: batch 64 at windows 2 and 3; at window 9 --batch 32, or 64 with
          --grad-accum-steps 2 (docs/measurements/memory.md). On one GPU of 80 GB use --batch 1;
          the frozen weights take 26 GB.
Expect:   RUN/bundle/lora.safetensors with the key names of diffusers, for sample.py --lora and
          diffusers, and RUN/bundle/lora_original.safetensors for other programs
          (docs/other-programs.md). LoRAs of this base model usually take a few hundred clips and a
          few thousand steps. Not yet trained at this size.
"""

from framepack_jax.data.config import DataConfig
from framepack_jax.training.config import (
    CheckpointConfig,
    LoRAConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)


def get_config() -> TrainConfig:
    """Adapters of rank 32 on all linear layers of the blocks except the modulations."""
    return TrainConfig(
        bundle="framepack_i2v",
        data=DataConfig(holdout=8),
        trainable="lora",
        lora=LoRAConfig(rank=32, alpha=32.0),
        batch=64,
        steps=3000,
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=100),
        guidance=1.0,
        remat="attention",
        validation=ValidationConfig(every=250, samples=16, videos=1),
        checkpoints=CheckpointConfig(every=250, keep=4),
    )
