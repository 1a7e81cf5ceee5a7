"""Settings of training a VAE; filled in and overridden as in `config`."""

import dataclasses
from typing import Literal, get_args

from framepack_jax.training.config import CheckpointConfig, OptimizerConfig, RunConfig

Trainable = Literal["all", "decoder"]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="cosine", weight_decay=0.0)
CHECKPOINTS = CheckpointConfig(every=250)


@dataclasses.dataclass(frozen=True)
class VaeTrainConfig(RunConfig):
    """Settings of training a VAE on a folder of videos."""

    bundle: str = ""
    """The bundle whose VAE is trained. The new bundle has its other networks."""
    videos: str = ""
    """Folder of videos."""
    trainable: Trainable = "all"
    """decoder: latents stay the same, so transformers that were trained on them need no more
    training."""
    frames: int = 17
    """Length of a clip, 1 + 4 k; sampling decodes clips of 17."""
    size: tuple[int, int] = (128, 128)
    """Height and width of a clip in pixels, cropped at random."""
    holdout: int = 16
    """Videos held out for validation, chosen by their names."""
    batch: int = 4
    """Clips a step, over all devices."""
    steps: int = 2000
    """Steps of the whole run."""
    kl: float = 1e-5
    """Weight of the KL divergence of a latent number, beside the squared error."""
    optimizer: OptimizerConfig = OPTIMIZER
    ema: float = 0.99
    """Decay of the moving average of the parameters, which is exported; 0: none."""
    validate_every: int = 500
    """Steps from one validation to the next."""
    checkpoints: CheckpointConfig = CHECKPOINTS
    tensorboard: bool = False
    """Write TensorBoard event files beside log.jsonl."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(f"--frames {self.frames}: expected 1 + 4 k, as 17")
        if min(self.size) < 8 or any(side % 8 for side in self.size):
            raise ValueError(f"--size {self.size}: expected multiples of 8 pixels")
        whole = {
            "batch": self.batch, "steps": self.steps, "validate-every": self.validate_every,
            "log-every": self.log_every, "max-nonfinite-steps": self.max_nonfinite_steps,
        }  # fmt: skip
        for name, value in whole.items():
            if value < 1:
                raise ValueError(f"--{name} {value}: expected a whole number of 1 or more")
        if self.trainable not in get_args(Trainable):
            raise ValueError(f"--trainable {self.trainable}: expected all or decoder")
        if self.holdout < 0 or not self.kl >= 0:
            raise ValueError(f"--holdout {self.holdout}, --kl {self.kl}: expected 0 or more")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema}: expected a decay from 0 to below 1")
