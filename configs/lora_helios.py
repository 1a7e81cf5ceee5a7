"""Train a LoRA for Helios-Base: a style, a motion, a person.

Command:  framepack prepare --videos clips/ --bundle weights/helios_base --output datasets/mine
          python train.py --config configs/lora_helios.py --bundle weights/helios_base
              --data.path datasets/mine --output runs/lora
Hardware: TPU v5p-64 (32 chips): 27 of 95 GB a chip by its compiler, and 1.6 s a step modelled
          (--dry-run v5p-64 --dry-run-size 384x640, data=2,fsdp=16). Not run on a TPU.
Expect:   RUN/bundle/lora.safetensors with the key names of diffusers, for sample.py --lora and
          diffusers, and RUN/bundle/lora_original.safetensors for other programs. The mid and
          distilled weights are refused: their stages have noise levels of their own. Not yet
          trained at this size.
"""

from framepack_jax.data.config import DataConfig
from framepack_jax.training.config import (
    CheckpointConfig,
    HistoryConfig,
    LoRAConfig,
    NoiseSchedule,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)


def get_config() -> TrainConfig:
    """Adapters of the release's rank on all linear layers of the blocks."""
    return TrainConfig(
        bundle="helios_14b",
        data=DataConfig(holdout=8),
        trainable="lora",
        lora=LoRAConfig(rank=128, alpha=128.0),
        batch=32,
        steps=3000,
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=100),
        noise_schedule=NoiseSchedule(mu=0.0),
        history=HistoryConfig(drop_all=0.4, drop_oldest=0.4, corrupt=1 / 3, clean=0.1),
        remat="full",
        validation=ValidationConfig(every=250, samples=16, videos=1),
        checkpoints=CheckpointConfig(every=250, keep=4),
    )
