"""The transformers of the tiny bundles, 3.3 million parameters, on the demo world.

Command:  make tiny-bundle, which has every step; the one that this file is for is
          python train.py --config configs/tiny_framepack.py
Hardware: two CPU cores; a step takes 3.8 s there, beside little other work.
Result:   500 steps on 289 clips: loss 0.32, from 3.4. Shapes and textures begin to form.
"""

from framepack_jax import packing
from framepack_jax.data import loader
from framepack_jax.training.config import Checkpoints, Config, Optimizer, Validation


def get_config() -> Config:
    """Forward order. The guidance input has in training what sampling gives it by default."""
    return Config(
        bundle="outputs/world/vae/bundle",
        output="outputs/world/f1",
        init="scratch",
        data=loader.Config(
            path="outputs/world/dataset", holdout=32, sections="random", caption_dropout=0.1,
            text_tokens=48,
        ),
        schedule=packing.RELEASED_F1,
        guidance=10.0,
        batch=16,
        steps=1500,
        optimizer=Optimizer("muon", learning_rate=3e-3, warmup_steps=100, schedule="cosine"),
        dtype="float32",
        remat="none",
        ema=0.99,
        validation=Validation(every=500, samples=32, sigmas=(0.3, 0.6, 0.9), sections=2, steps=10),
        checkpoints=Checkpoints(every=100),
    )  # fmt: skip
