"""Decode any video file, or a folder of pictures, to frames as a player shows them.

Like a player, this module chooses the stream, orders frames by their times, stretches pixels that
are not square, rotates and mirrors by the display matrix, deinterlaces, and converts colours for a
screen. Frames are (H, W, 3) uint8 sRGB.
"""

import collections
import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from framepack_jax.video.images import resize_center_crop
from framepack_jax.video.mp4 import (
    UnsupportedVideo,
    check_rate,
    coded_packets,
    frame_rate,
    named_video,
)
from framepack_jax.video.orientation import shown_size
from framepack_jax.video.source import Source, is_avi
from framepack_jax.video.times import NO_TIMES, end_of, time_of, times_before

# Seconds before the end of a file at which the search for its last frame begins.
TAIL = 2


class Info(NamedTuple):
    """Number of frames, frames per second (the mean if it varies), size in pixels as shown."""

    frames: int
    fps: float
    height: int
    width: int


def mp4_info(path: str | os.PathLike) -> Info:
    """Count the frames of a video file by its packets, decoding only the first.

    Raises ValueError if the file is no video that can be decoded.
    """
    return _scan(path)[0]


def count_frames(path: str | os.PathLike, fps: float) -> int:
    """Return how many frames `read_frames(path, fps)` yields, decoding only the end of the file.

    Raises ValueError if the file is no video that can be decoded, and for fps out of 0.1..1000.
    """
    check_rate(fps)
    with _opened(path, fps) as source:
        tail = collections.deque(source.frames_from(source.end - TAIL), maxlen=1)
        if not tail:
            raise ValueError("its last frame cannot be decoded")
        return times_before(end_of(tail[0], source.rate) - source.origin, frame_rate(fps))


def read_frames(
    path: str | os.PathLike, fps: float | None = None, first: int = 0
) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) uint8 RGB of a video file, one in memory at a time.

    With `fps`, the video is resampled to that constant rate: each time k / fps shows the last frame
    that has started by then. Frames are repeated or dropped; duration and speed stay the same. A
    repeated frame is the same array. A folder of pictures is shown at `fps`, 30 by default. With
    `first`, which needs `fps`, reading starts at that frame, and decoding at the last key frame
    before it.

    Raises ValueError if the file is no video that can be decoded, or ends before its header says
    (when that shows), and for fps out of 0.1..1000.
    """
    if fps is not None:
        check_rate(fps)
    return _read(path, fps, first)


def read_span(
    path: str | os.PathLike, fps: float, first: int, count: int, size: tuple[int, int]
) -> np.ndarray:
    """Return frames `first` .. `first + count - 1` of a video brought to a constant rate as by
    `read_frames`, scaled and cut to `size` (height, width): (count, height, width, 3) uint8 RGB.

    Decodes from the last key frame before them. Raises ValueError if the file is no video that can
    be decoded, or ends before.
    """
    frames: list[np.ndarray] = []
    with _opened(path, fps) as source:
        for frame, shown in source.at_rate(frame_rate(fps), first):
            if shown:
                picture = resize_center_crop(source.rgb(frame), *size)
                frames += [picture] * min(shown, count - len(frames))
            if len(frames) == count:
                return np.stack(frames)
        raise ValueError(f"it ends before frame {first + count - 1} at {fps} frames a second")


def read_frames_at(path: str | os.PathLike, numbers: Iterable[int]) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) uint8 RGB of these numbers, counted from 0: fast if they are few.

    Raises ValueError if the file is no video that can be decoded, or has no such frame.
    """
    info, times = _scan(path)
    with _opened(path) as source:
        for number in numbers:
            if not 0 <= number < info.frames:
                raise ValueError(f"frame {number} of {info.frames} does not exist")
            time = times[number]
            frame = next((f for f in source.frames_from(time) if time_of(f) >= time), None)
            if frame is None:
                raise ValueError(f"frame {number} of {info.frames} cannot be decoded")
            yield source.rgb(frame)


def read_mp4(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """Return the frames (T, H, W, 3) uint8 RGB of a video file, and its frames per second.

    Raises ValueError if the file is no video that can be decoded.
    """
    return np.stack(list(read_frames(path))), mp4_info(path).fps


@contextlib.contextmanager
def _opened(path: str | os.PathLike, fps: float | None = None) -> Iterator[Source]:
    with named_video(path), contextlib.closing(Source(path, fps)) as source:
        yield source


def _scan(path: str | os.PathLike) -> tuple[Info, list[Fraction]]:
    """Return the info of a video and the times in seconds of all frames, by the packets."""
    with _opened(path) as source:
        source.reopen()
        timed = "dts" if is_avi(source.container) else "pts"
        packets = coded_packets(source.container, source.stream)
        ticks = [getattr(p, timed) for p in packets if p.size and not p.is_discard]
        if None in ticks:
            raise UnsupportedVideo(NO_TIMES)
        # Packets before the first frame cannot be decoded: the file starts inside their group.
        every = sorted(tick * source.stream.time_base for tick in ticks)
        times = [time for time in every if time >= source.origin]
        size = shown_size(source.first, source.stream)
        return Info(len(times), float(source.rate), *size), times


def _read(path: str | os.PathLike, fps: float | None, first: int) -> Iterator[np.ndarray]:
    with _opened(path, fps) as source:
        repeated: Iterable[tuple[av.VideoFrame, int]] = ((frame, 1) for frame in source.frames())
        if fps is not None:
            repeated = source.at_rate(frame_rate(fps), first)
        for frame, times in repeated:
            picture = source.rgb(frame) if times else None
            yield from itertools.repeat(picture, times)
