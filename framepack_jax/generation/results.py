"""Results of sampling, and the error for results that are not finite."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class NotFinite(FloatingPointError):
    """Latents or frames of these `samples` of the batch have values that are not finite."""

    def __init__(self, message: str, samples: Sequence[int]) -> None:
        super().__init__(message)
        self.samples = tuple(samples)


def check_finite(number: int, steps: int, first_bad: np.ndarray, dtype: str) -> None:
    """Raise NotFinite unless `first_bad` (B,), the first bad step of each sample of section
    `number`, is all -1."""
    if bad := [b for b, step in enumerate(first_bad) if step >= 0]:
        advice = "" if dtype == "float32" else "try --dtype float32, or "
        raise NotFinite(
            f"section {number + 1}, step {first_bad[bad[0]] + 1} of {steps}: the prediction is"
            f" not finite in {dtype}; {advice}check the weights",
            bad,
        )


class DecodedSection(NamedTuple):
    """Latents of a section, and the frames that became final with one of its clips. If a section
    has two clips, the second has no latents.

    `frames` (P, height, width, 3) uint8 are the frames `start` .. `start + P - 1` of the video; P
    may be 0. `latents` (F, H, W, C) are the normalised latents at F `positions`: those of the
    section, and for the first or last section in time those of the start or end image.
    """

    start: int
    frames: np.ndarray
    positions: tuple[int, ...]
    latents: np.ndarray


class Video(NamedTuple):
    """A video: `frames` (P, height, width, 3) uint8; `latents` (T, H, W, C), normalised."""

    frames: np.ndarray
    latents: np.ndarray
