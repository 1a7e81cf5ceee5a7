"""Train a packed model from base Wan 2.1, as the first stage of Helios (arXiv 2603.04379).

Command:  framepack convert --pipeline Wan-AI/Wan2.1-T2V-14B-Diffusers --from-base
              --output weights/from_wan
          framepack prepare --videos clips/ --bundle weights/from_wan --output datasets/large
          python train.py --config configs/from_wan.py --bundle weights/from_wan
              --data.path datasets/large --output runs/packed
              --mesh data=2,fsdp=16 --coordinator-address auto
Hardware: TPU v5p-64 (32 chips): 37.3 of 95 GB a chip and 2.6 s a step at a batch of 32, by the
          TPU's compiler and a model of its links (--dry-run v5p-64 --dry-run-size 384x640, with
          the sizes of helios_14b).
Expect:   context embeddings start as copies of the patch embedding, so the first losses are those
          of a video model that reads its history as more frames. The release trains adapters of
          rank 128 and the context embeddings in full (--trainable lora --lora.context --lora.rank
          128 --lora.alpha 128); this configuration trains all parameters.
          A first stage for the context embeddings alone is cheap: --trainable context --steps 2000
          --optimizer.learning-rate 1e-4 --output runs/stage1. The number of steps that a good
          model takes is not known.
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
    """Learning rate, noise levels and history of the release; no caption dropout."""
    return TrainConfig(
        bundle="helios_14b",
        data=DataConfig(holdout=64, sections="random"),
        batch=64,
        steps=100_000,
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=1000),
        noise_schedule=NoiseSchedule(mu=0.0),
        history=HistoryConfig(drop_all=0.4, drop_oldest=0.4, corrupt=1 / 3, clean=0.1),
        ema=0.9999,
        remat="full",
        validation=ValidationConfig(every=1000, samples=64, videos=2),
        checkpoints=CheckpointConfig(every=1000, keep=3, keep_every=10_000),
    )
