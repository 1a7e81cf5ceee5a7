"""Distill the bundle tiny_inverted (3.3 million parameters) to four steps on the demo world.

Command:  python train.py --config configs/tiny_distill.py
          framepack sample --bundle outputs/world/four_steps/bundle --image photo.jpg --prompt "..."
          The dataset is the one of `make tiny-bundle`.
Hardware: two CPU cores; a step computes five forward passes, where configs/tiny_framepack.py has
          three.
Result:   not yet run.
"""

from framepack_jax.data.config import DataConfig
from framepack_jax.training.config import (
    CheckpointConfig,
    DistillConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)


def get_config() -> TrainConfig:
    """Noise levels and guidance input are those that the teacher is sampled with by default."""
    return TrainConfig(
        bundle="tiny_inverted",
        output="outputs/world/four_steps",
        data=DataConfig(
            path="outputs/world/dataset", holdout=32, sections="random", caption_dropout=0.1,
            text_tokens=48,
        ),
        distill=DistillConfig(steps=4, teacher_steps=24),
        guidance=10.0,
        batch=16,
        steps=600,
        optimizer=OptimizerConfig("muon", learning_rate=1e-3, warmup_steps=30, schedule="cosine"),
        dtype="float32",
        remat="none",
        ema=0.99,
        validation=ValidationConfig(every=600, samples=32, sigmas=(0.3, 0.6, 0.9), sections=2),
        checkpoints=CheckpointConfig(every=100),
    )  # fmt: skip
