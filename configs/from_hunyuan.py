"""Train a FramePack model from base HunyuanVideo. The authors' recipe is not public.

Command:  framepack convert --pipeline HunyuanVideo --from-base --image-encoder
              flux_redux_bfl/image_encoder --output weights/from_base
          python train.py --config configs/from_hunyuan.py --bundle weights/from_base
              --data.path datasets/large --output runs/framepack
              --mesh data=2,fsdp=16 --coordinator-address auto
Hardware: TPU v5p-64 (32 chips); 64 x H100 (docs/measurements/memory.md).
Expect:   context embeddings start as copies of the patch embedding, so the first losses are those
          of a video model that reads its history as more frames. The image projection starts at
          random, at the scale of text tokens. A first stage for these alone is cheap:
          --trainable context --steps 2000 --optimizer.learning-rate 1e-4 --output runs/stage1.
          Export it (framepack export-run) and start the second stage from that bundle. The number
          of steps that a good model takes is not known.
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
    """Use the inverted order of the paper's best variant."""
    return TrainConfig(
        bundle="framepack_i2v",
        schedule="f1k1_x_g9_f1k1f2k2f16k4_td",
        data=DataConfig(holdout=64, caption_dropout=0.1, sections="random"),
        batch=64,
        steps=100_000,
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=1000),
        noise_schedule=NoiseSchedule(high=0.15),
        guidance=1.0,
        ema=0.9999,
        remat="full",
        validation=ValidationConfig(every=1000, samples=64, videos=2),
        checkpoints=CheckpointConfig(every=1000, keep=3, keep_every=10_000),
    )
