"""Settings of the training data."""

import dataclasses
import math
from typing import Annotated, Literal

from framepack_jax.models.sizes import MAX_PROMPT_TOKENS
from framepack_jax.utils.paths import FILES_IN_STORES

MIN_VALUES = {
    "holdout": 0,
    "min_clips": 1,
    "threads": 1,
    "buffer": 1,
    "workers": 0,
    "max_bad_records": 0,
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a training run."""

    path: Annotated[str | tuple[str, ...], FILES_IN_STORES] = ""
    """Folders of one or several datasets, written by framepack prepare."""
    weights: tuple[float, ...] = ()
    """Weight of each dataset: its part of the batches. Each batch has one dataset. Default: the
    numbers of clips."""
    seed: int = 0
    """Seed of the order of clips and of the choice of sections."""
    holdout: int = 0
    """Minimum number of clips of each dataset to keep for validation. Whole videos are held out,
    chosen by their names."""
    caption_dropout: float = 0.0
    """Fraction of samples whose caption is replaced by the empty prompt."""
    image_dropout: float = 0.0
    """Fraction of samples whose image tokens are zero, as those of a video from text."""
    empty_start: float = 0.0
    """Fraction of samples that are sections of a video from text: it starts with nothing known, and
    its image tokens are zero. The exported bundle then makes videos without an image. Orders that
    need a start image refuse it; bundles that decode sections alone train such videos anyway."""
    sections: Literal["whole", "random"] = "whole"
    """whole: use the full length of each clip. random: cut each clip to a random number of sections
    first, so that the model sees short videos. In forward order a section does not depend on those
    after it, so random is the same as whole."""
    section_weights: tuple[float, ...] = ()
    """Weights of the sections of a clip in order of generation, the last for all after it; default:
    all sections are drawn equally often."""
    estimate: Literal["section", "last"] = "section"
    """What history that is ordered by importance (~cos, ~hybrid) is compared with: the mean frame
    of the true section with noise, in place of an estimate of it; or the last frame before the
    section, as sampling does."""
    estimate_noise: float = 0.3
    """Noise level, 0 to 1, of --data.estimate section."""
    windows: tuple[int, ...] = ()
    """Latent windows to draw for each batch, uniformly; default: the window of the schedule.
    Validation always uses the window of the schedule."""
    text_tokens: int | None = None
    """Length in tokens to which captions are padded; default: as many as the bundle reads. A
    smaller value saves work if all captions are short, and changes nothing else; it cannot be given
    for networks that read the padding, as Wan's and Helios'."""
    min_clips: int = 1
    """Leave out buckets of a dataset with fewer clips to train on: each has a compiled program of
    its own, and its clips come again and again."""
    threads: int = 4
    """Reader threads; more than 4 gain nothing for latents."""
    buffer: int = 16
    """Samples that a host reads ahead, whatever the batch. (The default of Grain, 500, takes 23 GB
    of latents.)"""
    workers: int = 0
    """Reader processes; they help only with raw videos, which are decoded in training."""
    max_bad_records: int = 10
    """Unreadable clips to tolerate: each is logged and replaced by another clip of its bucket. One
    more ends the run with a checkpoint."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Folders of the datasets."""
        if isinstance(self.path, str):
            return (self.path,) if self.path else ()
        return tuple(self.path)

    def __post_init__(self) -> None:
        self._check_datasets()
        for name in ("caption_dropout", "image_dropout", "empty_start", "estimate_noise"):
            if not 0 <= getattr(self, name) <= 1:
                flag = name.replace("_", "-")
                raise ValueError(
                    f"--data.{flag} {getattr(self, name)}: expected a fraction from 0 to 1"
                )
        if not all(0 < weight < math.inf for weight in self.section_weights):
            given = " ".join(f"{weight:g}" for weight in self.section_weights)
            raise ValueError(f"--data.section-weights {given}: expected numbers above 0")
        if self.text_tokens is not None and not 1 <= self.text_tokens <= MAX_PROMPT_TOKENS:
            raise ValueError(
                f"--data.text-tokens {self.text_tokens}: expected 1 to {MAX_PROMPT_TOKENS}"
            )
        if any(window < 1 for window in self.windows):
            raise ValueError(f"--data.windows {self.windows}: expected latent frames, 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--data.seed {self.seed}: expected a whole number from 0 to 2^32 - 1")
        for name, minimum in MIN_VALUES.items():
            if getattr(self, name) < minimum:
                flag = name.replace("_", "-")
                raise ValueError(f"--data.{flag} {getattr(self, name)}: expected {minimum} or more")

    def _check_datasets(self) -> None:
        """Raise ValueError if folders are named twice, or weights do not fit them."""
        if twice := [path for path in self.paths if self.paths.count(path) > 1]:
            raise ValueError(f"--data.path names {twice[0]} twice; give it a larger weight instead")
        if not all(self.paths):
            raise ValueError(f"--data.path {self.paths}: expected folders, one is an empty text")
        given = " ".join(f"{weight:g}" for weight in self.weights)
        if self.weights and len(self.weights) != len(self.paths):
            raise ValueError(
                f"--data.weights {given}: expected as many numbers as there are datasets,"
                f" {len(self.paths)} (--data.path {' '.join(self.paths)})"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"--data.weights {given}: expected numbers above 0")
