"""Scores of a clip, and the thresholds that a clip must meet to get into a dataset.

Shapes: P frames, H W rows and columns.
"""

import dataclasses
from collections.abc import Container

import numpy as np
from PIL import Image

# Size (height, width) of the pictures for measuring cuts and motion.
SMALL = (36, 64)
# Highest grey level of a black border line, in all frames.
BLACK = 20
# Cells (rows, columns) of the perceptual hash.
HASH = (8, 9)


def scores(frames: np.ndarray, repeated: np.ndarray | None = None) -> dict[str, float]:
    """Measure the scores of a clip (P, H, W, 3) uint8.

    motion: mean change of levels from frame to frame. sharpness: variance of the Laplacian.
    brightness: mean level. All three in levels of 0 to 255. black_bars: fraction of the picture in
    black lines at its borders. still: fraction of the frames that equal the frame before. hash:
    perceptual hash of the middle frame, as a number; similar pictures share it.

    Args:
        repeated: (P - 1,) bool, True for frames that repeat the one before to reach a higher rate.
            They do not count as still.
    """
    small = np.stack([small_picture(frame) for frame in frames])
    steps = np.abs(np.diff(small, axis=0))
    own = steps if repeated is None or repeated.all() else steps[~repeated]
    middle = np.asarray(Image.fromarray(frames[len(frames) // 2]).convert("L"), np.float32)
    laplacian = (
        middle[:-2, 1:-1] + middle[2:, 1:-1] + middle[1:-1, :-2] + middle[1:-1, 2:]
        - 4 * middle[1:-1, 1:-1]
    )  # fmt: skip
    brightest = frames[:: max(1, len(frames) // 16)].max(axis=(0, 3))
    return {
        "motion": round(float(steps.mean()), 4),
        "sharpness": round(float(laplacian.var()), 3),
        "brightness": round(float(small.mean()), 3),
        "black_bars": round(_black_share(brightest), 4),
        "still": round(
            float((own.max(axis=(1, 2, 3), initial=0) == 0).mean()) if len(own) else 1.0, 4
        ),
        "hash": float(_hash(middle) >> 11),
    }


def small_picture(frame: np.ndarray) -> np.ndarray:
    """Scale a frame (H, W, 3) uint8 down to `SMALL`, float32."""
    small = Image.fromarray(frame).resize(SMALL[::-1], Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def _black_share(brightest: np.ndarray) -> float:
    """Return the fraction of black border lines, given the brightest grey (H, W) of each pixel."""
    share = 0.0
    for lines in (brightest.max(axis=1), brightest.max(axis=0)):
        lit = np.flatnonzero(lines > BLACK)
        inside = lit[-1] - lit[0] + 1 if len(lit) else 0
        share = max(share, 1 - inside / len(lines))
    return float(share)


def _hash(grey: np.ndarray) -> int:
    """Return 64 bits: which of two neighbouring cells of a coarse picture is brighter."""
    picture = Image.fromarray(grey.astype(np.uint8))
    cells = np.asarray(picture.resize(HASH[::-1], Image.Resampling.BOX), np.int16)
    bits = (cells[:, 1:] > cells[:, :-1]).ravel()
    return int("".join("01"[int(bit)] for bit in bits), 2)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Limits on the scores of a clip, applied when the dataset is written."""

    min_seconds: float = 1.3
    """Minimum length in seconds. A section of 9 latent frames needs 1.24 s."""
    min_motion: float = 0.05
    """Minimum mean change of levels from frame to frame."""
    max_motion: float = 60.0
    """Maximum mean change of levels from frame to frame."""
    min_sharpness: float = 2.0
    """Minimum variance of the Laplacian; blurred pictures have less."""
    min_brightness: float = 8.0
    """Minimum mean level."""
    max_black_bars: float = 0.15
    """Maximum fraction of the picture in black borders."""
    max_still: float = 0.5
    """Maximum fraction of frames that equal the frame before."""
    keep_duplicates: bool = False
    """Keep clips whose middle frame looks like that of an earlier clip."""

    def judge(self, seconds: float, scores: dict[str, float], seen: Container[float]) -> str | None:
        """Return the reason to reject a clip, None to accept it. `seen` are hashes of accepted
        clips."""
        limits = (
            ("too_short", seconds < self.min_seconds),
            ("little_motion", scores["motion"] < self.min_motion),
            ("much_motion", scores["motion"] > self.max_motion),
            ("blurred", scores["sharpness"] < self.min_sharpness),
            ("dark", scores["brightness"] < self.min_brightness),
            ("black_bars", scores["black_bars"] > self.max_black_bars),
            ("still", scores["still"] > self.max_still),
            ("duplicate", not self.keep_duplicates and scores["hash"] in seen),
        )
        return next((reason for reason, fails in limits if fails), None)
