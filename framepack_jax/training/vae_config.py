"""Settings of training a VAE; filled in and overridden as in `config`."""

import dataclasses
from typing import Annotated, Literal

from framepack_jax.training.config import (
    CheckpointConfig,
    Count,
    Decay,
    NonNegative,
    OptimizerConfig,
    Positive,
    RunConfig,
    check_run,
)
from framepack_jax.utils import fields
from framepack_jax.utils.paths import IN_STORES

Trainable = Literal["all", "decoder"]
Error = Literal["squared", "absolute"]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="cosine", weight_decay=0.0)
CHECKPOINTS = CheckpointConfig(every=250)


@dataclasses.dataclass(frozen=True)
class VaeTrainConfig(RunConfig):
    """Settings of training a VAE on a folder of videos."""

    bundle: Annotated[str, IN_STORES] = ""
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
    holdout: Count = 16
    """Videos held out for validation, chosen by their names."""
    batch: Positive = 4
    """Clips a step, over all devices."""
    steps: Positive = 2000
    """Steps of the whole run."""
    kl: NonNegative = 1e-5
    """Weight of the KL divergence of a latent number, beside the error."""
    error: Error = "squared"
    """Error of a pixel."""
    gradient_error: NonNegative = 0.0
    """Weight of the absolute error of the differences between neighbouring pixels."""
    edge_weight: NonNegative = 1.0
    """Weight of the pixels within 3 pixels of an edge, relative to the others."""
    latent_noise: NonNegative = 0.0
    """Standard deviation of the noise that training adds to the latents that the decoder reads."""
    optimizer: OptimizerConfig = OPTIMIZER
    ema: Decay = 0.99
    """Decay of the moving average of the parameters, which is exported; 0: none."""
    validate_every: Positive = 500
    """Steps from one validation to the next."""
    checkpoints: CheckpointConfig = CHECKPOINTS
    tensorboard: bool = False
    """Write TensorBoard event files beside log.jsonl."""

    def __post_init__(self) -> None:
        fields.check(self)
        check_run(self)
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(f"--frames {self.frames}: expected 1 + 4 k, as 17")
        if self.checkpoints.keep_best:
            raise ValueError(
                "--checkpoints.keep-best needs a validation loss, which VAE runs do not have; use"
                " --checkpoints.keep-every"
            )
        if min(self.size) < 8 or any(side % 8 for side in self.size):
            raise ValueError(f"--size {self.size}: expected multiples of 8 pixels")
