"""Results of sampling, and what goes wrong with them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class NotFinite(FloatingPointError):
    """Latents or frames with values that are not finite, for these `samples` of the batch."""

    def __init__(self, message: str, samples: Sequence[int]) -> None:
        super().__init__(message)
        self.samples = tuple(samples)


class DecodedSection(NamedTuple):
    """Results of one section: its latents, and the frames that became final with it.

    `frames` (P, height, width, 3) uint8 are the video's frames `start` .. `start + P - 1`; there
    may be none yet. `latents` (F, H, W, C) are those of the F latent `positions`, normalised: the
    section's, and with the first or last in time the start or end image's.
    """

    start: int
    frames: np.ndarray
    positions: tuple[int, ...]
    latents: np.ndarray


class Video(NamedTuple):
    """`frames` (P, height, width, 3) uint8; `latents` (T, H, W, C), normalised."""

    frames: np.ndarray
    latents: np.ndarray
