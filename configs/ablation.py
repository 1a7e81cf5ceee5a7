"""Train the methods of the paper from the bundle `tiny`, and compare them on the demo world.

Command:  framepack ablation --config configs/ablation.py
Hardware: two CPU cores, about half an hour at this size (64x64 pixels, 60 steps a method). For
          figures that mean something: --evaluate.size 128x128 --clips 700 --train.steps 3000
          --evaluate.videos 32 --evaluate.seconds 10 20, and more than one seed.
Methods:  arXiv 2504.12626, tables 1 and 2. Add a row, remove one, or give --only NAME NAME.
"""

from pathlib import Path

from framepack_jax.cli.ablation import AblationConfig
from framepack_jax.cli.evaluate import Suites
from framepack_jax.data.config import DataConfig
from framepack_jax.toy.methods import Method
from framepack_jax.training.config import (
    CheckpointConfig,
    NoiseSchedule,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)

VANILLA = "td_f16k4f2k2f1k1_g9"
INVERTED = "f1k1_x_g9_f1k1f2k2f16k4_td"

NOISY = {"history.noisy": "random"}

# The first one makes the reference rows: the reconstruction of its VAE, and chained short clips.
METHODS = (
    Method("vanilla", VANILLA),
    Method("inverted", INVERTED),
    Method("repeated image-to-video", "td_f1k1_g9"),
    Method("vanilla, discretized", f"{VANILLA}+D128"),
    Method("anchor frames", "f1k1_x_f16k1_g17"),
    Method("endpoint", f"{VANILLA}_x_f1k1"),
    Method("noisy history, random / 0.1", VANILLA, NOISY, {"history_noise": 0.1}),
    Method("noisy history, random / 0.5", VANILLA, NOISY, {"history_noise": 0.5}),
    Method("noisy history, random / 0", VANILLA, NOISY),
    Method(
        "history guidance", VANILLA, {"history.drop_history": 0.1},
        {"cfg_scale": 1.5, "cfg_without": "history"},
    ),
    Method("causal attention", VANILLA, {"causal": True}),
    Method("own predictions as history", VANILLA, {"history.rollouts": 0.5}),
    Method("importance, hybrid", f"{VANILLA}~hybrid(1)"),
    Method("anchored forward (F1)", "f1k1_x_f16k4f2k2f1k1_g9"),
    Method("planned, every 2nd section", f"{INVERTED}@planned(2)"),
    Method("corrupted history", VANILLA, {"history.corrupt": 0.333}),
    Method("tail averaged", "ta_f16k4f2k2f1k1_g9"),
    Method("tail compressed", "tc_f16k4f2k2f1k1_g9"),
)  # fmt: skip


def get_config() -> AblationConfig:
    """All methods see the same clips, in the same order, for as many steps."""
    train = TrainConfig(
        bundle="tiny",
        init="bundle",
        data=DataConfig(caption_dropout=0.1, text_tokens=48),
        guidance=10.0,
        batch=8,
        steps=60,
        optimizer=OptimizerConfig("muon", learning_rate=1e-3, warmup_steps=6, schedule="cosine"),
        noise_schedule=NoiseSchedule(mu=1.0, high=0.15),
        dtype="float32",
        remat="none",
        ema=0.99,
        validation=ValidationConfig(every=0),
        checkpoints=CheckpointConfig(every=30, keep=1),
    )
    return AblationConfig(
        output=Path("outputs/ablation"),
        methods=METHODS,
        clips=48,
        train=train,
        evaluate=Suites(
            videos=8, seconds=(4.8,), occlusion_videos=0, prompt_pairs=0, size="64x64", steps=10,
            batch=8,
        ),
    )  # fmt: skip
