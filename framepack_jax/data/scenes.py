"""Cut a video into clips of one bucket at its scene changes.

    probe -> frames resampled to a fixed rate by their times -> scene cuts -> clips -> scores

The functions take and return plain values, so that they run in threads or on a cluster. A video is
streamed: only the frames of one clip are in memory, scaled and cropped to the bucket.

Shapes: P frames, H W rows and columns.
"""

import dataclasses
import itertools
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from framepack_jax.data import filters
from framepack_jax.data.probe import probe
from framepack_jax.data.rejected import Rejected
from framepack_jax.packing.buckets import find_bucket
from framepack_jax.video import read_frames, resize_center_crop

# A clip has 1 + 4 k frames, two latent frames at least; or whole chunks.
MIN_FRAMES = 5
# Minimum ratio of the sides of a video to those of its bucket.
MIN_SCALE = 0.25


@dataclasses.dataclass(frozen=True)
class SceneSettings:
    """Settings that determine the frames of a clip; part of the fingerprint of a dataset."""

    fps: float = 30.0
    max_frames: int = 597
    """Longer scenes are divided."""
    cut: float = 0.08
    """Mean change of levels, 0 to 1, at which a scene ends (--scene-threshold)."""
    buckets: tuple[tuple[int, int], ...] = ()
    time_compression: int = 4
    chunk_frames: int = 0
    """Frames that are encoded alone: a clip has whole chunks of them; 0: clips are encoded whole.
    """

    @property
    def min_frames(self) -> int:
        """Number of frames of the shortest clip."""
        return self.chunk_frames or MIN_FRAMES

    def usable(self, count: int) -> int:
        """Return how many of `count` frames a clip keeps, 0 if they are too few."""
        rest = (
            count % self.chunk_frames if self.chunk_frames else (count - 1) % self.time_compression
        )
        return count - rest if count >= self.min_frames else 0


class SceneClip(NamedTuple):
    """A clip: number of its first frame in the video at the rate of the settings, frames (P, H, W,
    3) uint8, and scores."""

    first: int
    frames: np.ndarray
    scores: dict[str, float]


def clips(
    path: Path, settings: SceneSettings, start: float = 0.0, end: float = math.inf
) -> Generator[SceneClip, None, None]:
    """Yield the clips of a video from `start` to `end` seconds.

    Raises Rejected. If the file is damaged, the error may come after some clips, which must then be
    discarded.
    """
    bucket = _bucket(path, settings)
    begin, stop = round(start * settings.fps), end * settings.fps
    scene = _Scene(begin, settings)
    try:
        for number, frame in enumerate(read_frames(path, settings.fps, begin), begin):
            if number >= stop:
                break
            if scene.repeats(frame):
                continue
            small = filters.small_picture(frame)
            if scene.ends_before(small):
                yield from scene.clip()
                scene.restart(number)
            scene.add(frame, small, resize_center_crop(frame, *bucket))
        yield from scene.clip()
    except ValueError as error:
        if isinstance(error, Rejected):
            raise
        raise Rejected("damaged", f"{path}, after {begin + scene.total} frames: {error}") from error
    if scene.total < settings.min_frames:
        span = f" between {start:g} and {end:g} s" if begin or end < math.inf else ""
        raise Rejected(
            "too_short", f"{path} has {scene.total} frames{span} at {settings.fps:g} a second; at"
            f" least {settings.min_frames} are needed"
        )  # fmt: skip


def _bucket(path: Path, settings: SceneSettings) -> tuple[int, int]:
    """Return the bucket of a video. Raises Rejected if the video is much smaller."""
    found = probe(path)
    bucket = find_bucket(found.height, found.width, settings.buckets)
    if min(found.height / bucket[0], found.width / bucket[1]) < MIN_SCALE:
        raise Rejected(
            "too_small",
            f"{path} is {found.height} x {found.width} pixels, less than a quarter of {bucket}",
        )
    return bucket


class _Scene:
    """The frames of the clip that is being read, from frame `first` on; `total` counts the frames
    of the video so far."""

    def __init__(self, first: int, settings: SceneSettings) -> None:
        self.settings, self.first, self.total = settings, first, 0
        self.frames: list[np.ndarray] = []
        self._shown: np.ndarray | None = None
        self._small: np.ndarray | None = None

    def repeats(self, frame: np.ndarray) -> bool:
        """Add a frame that repeats the last one to reach the rate; return False for others."""
        if frame is not self._shown or not 0 < len(self.frames) < self.settings.max_frames:
            return False
        self.frames.append(self.frames[-1])
        self.total += 1
        return True

    def ends_before(self, small: np.ndarray) -> bool:
        """Return True if the clip ends before a frame, given as a small picture."""
        is_new = self._small is not None and is_cut(self._small, small, self.settings.cut)
        return bool(self.frames) and (is_new or len(self.frames) == self.settings.max_frames)

    def add(self, frame: np.ndarray, small: np.ndarray, cropped: np.ndarray) -> None:
        self._shown, self._small = frame, small
        self.frames.append(cropped)
        self.total += 1

    def restart(self, first: int) -> None:
        self.frames, self.first = [], first

    def clip(self) -> Iterator[SceneClip]:
        """Yield a clip of the frames, shortened to 1 + 4 k or to whole chunks; nothing if they are
        too few."""
        held = self.frames
        if count := self.settings.usable(len(held)):
            frames = np.stack(held[:count])
            repeated = [a is b for a, b in itertools.pairwise(held[:count])]
            yield SceneClip(self.first, frames, filters.scores(frames, np.array(repeated)))


def is_cut(before: np.ndarray, after: np.ndarray, threshold: float) -> bool:
    """Return True if a scene ends between two small pictures (h, w, 3): most pixels change, and so
    does the histogram, which motion leaves alike."""
    changed = np.abs(after - before).mean() / 255
    if changed <= threshold:
        return False
    counts = [
        np.stack([np.histogram(x[:, :, c], 16, (0, 255))[0] for c in range(3)]) / x.size
        for x in (before, after)
    ]
    return bool(np.abs(counts[0] - counts[1]).sum() > 3 * threshold)
