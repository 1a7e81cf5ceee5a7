"""From a video file to clips of one bucket, with the scores they are judged by.

Stages are plain functions of plain values, so that they run in threads here or on a cluster. A
video is streamed: at most the frames of one clip are in memory, scaled and cut to its bucket.

    probe -> frames brought to 30 a second by their times -> scene cuts -> clips -> scores

Shapes: P frames, H W rows and columns.
"""

import dataclasses
import itertools
import math
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image

from framepack_jax.packing.buckets import find_bucket
from framepack_jax.video import (
    check_colours,
    read_frames,
    resize_center_crop,
    shown_size,
    video_stream,
)

SUFFIXES = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".gif", ".wmv", ".flv", ".3gp", ".3g2", ".ogv", ".vob", ".m2v", ".mxf", ".asf", ".qt", ".f4v",
)  # fmt: skip
# What cuts and scores are taken on: (height, width) of small pictures.
SMALL = (36, 64)
# A clip has 1 + 4 k frames, and two latents at least.
LEAST_FRAMES = 5
# Grey levels below which a border line is black, in all frames.
BLACK = 20
HASH = (8, 9)


class Rejected(ValueError):
    """A video that gives no clips: `reason`, a short key, and what exactly is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class FilterSettings:
    """What decides which frames a clip has."""

    fps: float = 30.0
    max_frames: int = 597
    """Longer scenes are divided."""
    cut: float = 0.08
    """Mean change of levels, 0 to 1, at which a scene ends."""
    buckets: tuple[tuple[int, int], ...] = ()
    time_compression: int = 4


class Probe(NamedTuple):
    """Size as shown, and seconds, None where the file does not say."""

    height: int
    width: int
    seconds: float | None


class Cut(NamedTuple):
    """A clip: its first frame in the video at the settings' rate, its frames (P, H, W, 3) uint8,
    and its scores."""

    first: int
    frames: np.ndarray
    scores: dict[str, float]


def probe(path: Path) -> Probe:
    """Look at a file without decoding more than a frame. Raises Rejected."""
    if not path.exists():
        raise Rejected("missing", f"{path} does not exist")
    if not path.stat().st_size:
        raise Rejected("empty_file", f"{path} has no bytes")
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(path, container)
            frame = next(container.decode(stream), None)
            if frame is None:
                raise Rejected("unreadable", f"{path} has no frame that can be decoded")
            _check_colours(path, frame)
            height, width = shown_size(frame, stream)
            length = container.duration
            return Probe(height, width, None if length is None else length / av.time_base)
    except (av.FFmpegError, IndexError, ValueError, OSError) as error:
        if isinstance(error, Rejected):
            raise
        raise Rejected("unreadable", f"{path} cannot be read ({error})") from error


def _check_colours(path: Path, frame: av.VideoFrame) -> None:
    try:
        check_colours(frame)
    except ValueError as error:
        raise Rejected("colours", f"{path}: {error}") from error


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    try:
        return video_stream(container)
    except ValueError as error:
        raise Rejected("no_video", f"{path}: {error}") from error


def clips(
    path: Path, settings: FilterSettings, start: float = 0.0, end: float = math.inf
) -> Iterator[Cut]:
    """The clips of a video from `start` to `end` seconds, one after another. Raises Rejected, also
    after clips were given: then the file is damaged, and they are not to be used."""
    found = probe(path)
    bucket = find_bucket(found.height, found.width, settings.buckets)
    if min(found.height / bucket[0], found.width / bucket[1]) * 4 < 1:
        raise Rejected(
            "too_small",
            f"{path} is {found.height} x {found.width} pixels, less than a quarter of {bucket}",
        )
    held: list[np.ndarray] = []
    begin, stop = round(start * settings.fps), end * settings.fps
    first, total, before, shown = begin, 0, None, None
    try:
        for number, frame in enumerate(read_frames(path, settings.fps, begin), begin):
            if number >= stop:
                break
            if frame is shown and 0 < len(held) < settings.max_frames:
                held.append(held[-1])  # repeated to reach the rate
                total += 1
                continue
            shown, small = frame, _small(frame)
            ends = before is not None and is_cut(before, small, settings.cut)
            if held and (ends or len(held) == settings.max_frames):
                yield from _clip(first, held, settings)
                held, first = [], number
            held.append(resize_center_crop(frame, *bucket))
            before, total = small, total + 1
        yield from _clip(first, held, settings)
    except ValueError as error:
        if isinstance(error, Rejected):
            raise
        raise Rejected("damaged", f"{path}, after {begin + total} frames: {error}") from error
    if total < LEAST_FRAMES:
        span = f" between {start:g} and {end:g} s" if begin or end < math.inf else ""
        raise Rejected(
            "too_short", f"{path} has {total} frames{span} at {settings.fps:g} a second; at least"
            f" {LEAST_FRAMES} are needed"
        )  # fmt: skip


def _clip(first: int, held: list[np.ndarray], settings: FilterSettings) -> Iterator[Cut]:
    """A clip of the frames held, cut to 1 + 4 k; none where they are too few."""
    count = len(held) - (len(held) - 1) % settings.time_compression if held else 0
    if count >= LEAST_FRAMES:
        frames = np.stack(held[:count])
        repeated = [a is b for a, b in itertools.pairwise(held[:count])]
        yield Cut(first, frames, scores(frames, np.array(repeated)))


def is_cut(before: np.ndarray, after: np.ndarray, threshold: float) -> bool:
    """Whether a scene ends between two small pictures (h, w, 3): much changes everywhere, and so do
    the levels that occur, which motion leaves alike."""
    changed = np.abs(after - before).mean() / 255
    if changed <= threshold:
        return False
    counts = [
        np.stack([np.histogram(x[:, :, c], 16, (0, 255))[0] for c in range(3)]) / x.size
        for x in (before, after)
    ]
    return bool(np.abs(counts[0] - counts[1]).sum() > 3 * threshold)


def scores(frames: np.ndarray, repeated: np.ndarray | None = None) -> dict[str, float]:
    """Measure what a clip (P, H, W, 3) is judged by; `repeated` (P - 1,) says which frames after
    the first were repeated to bring the video to a higher rate.

    motion: mean change of levels from frame to frame; sharpness: variance of the Laplacian;
    brightness: mean level; all of levels 0 to 255. black_bars: share of the picture in black
    lines at its borders; still: share of frames, but for `repeated`, equal to the one before; hash:
    64 bits of the middle frame that alike pictures share, as a number.
    """
    small = np.stack([_small(frame) for frame in frames])
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


def _small(frame: np.ndarray) -> np.ndarray:
    small = Image.fromarray(frame).resize(SMALL[::-1], Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def _black_share(brightest: np.ndarray) -> float:
    """Of the brightest grey (H, W) that each pixel ever has, the share in black border lines."""
    share = 0.0
    for lines in (brightest.max(axis=1), brightest.max(axis=0)):
        lit = np.flatnonzero(lines > BLACK)
        inside = lit[-1] - lit[0] + 1 if len(lit) else 0
        share = max(share, 1 - inside / len(lines))
    return float(share)


def _hash(grey: np.ndarray) -> int:
    """64 bits: which of neighbouring cells of a coarse picture is brighter."""
    picture = Image.fromarray(grey.astype(np.uint8))
    cells = np.asarray(picture.resize(HASH[::-1], Image.Resampling.BOX), np.int16)
    bits = (cells[:, 1:] > cells[:, :-1]).ravel()
    return int("".join("01"[int(bit)] for bit in bits), 2)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Which clips get into a dataset; applied when it is packed."""

    min_seconds: float = 1.3
    """Shorter clips are left out. A section of 9 latent frames needs 1.24 s."""
    min_motion: float = 0.05
    """Least mean change of levels from frame to frame."""
    max_motion: float = 60.0
    """Most of it."""
    min_sharpness: float = 2.0
    """Least variance of the Laplacian, by which blurred pictures are known."""
    min_brightness: float = 8.0
    """Least mean level."""
    max_black_bars: float = 0.15
    """Largest share of the picture in black borders."""
    max_still: float = 0.5
    """Largest share of frames that are equal to the one before."""
    keep_duplicates: bool = False
    """Keep clips that look like an earlier one in the middle."""

    def judge(self, seconds: float, scores: dict[str, float], seen: Container[float]) -> str | None:
        """Why a clip is left out, None where it gets in; `seen` are hashes of those that did."""
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
        return next((reason for reason, true in limits if true), None)
