"""Decode any video file to frames as a good player shows them.

A player chooses the stream, orders frames by their times, stretches pixels that are not square,
turns and mirrors by the display matrix, deinterlaces, and converts colours for a screen; so does
this module. Frames are (H, W, 3) uint8 sRGB.
"""

import collections
import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.stream import VideoStream

from framepack_jax.video.colour import ColourConverter
from framepack_jax.video.images import resize_center_crop
from framepack_jax.video.mp4 import (
    UnsupportedVideo,
    check_rate,
    coded_packets,
    frame_rate,
    named_video,
)

# Times in files are often rounded to milliseconds: a frame that is late by less is on time.
TIME_ROUNDING = Fraction(1, 1000)
# Seconds before the end of a file at which the search for its last frame begins.
TAIL = 2
# Formats of libavformat in which times after a seek are guessed: they are read from the start.
SEQUENTIAL = ("avi", "mpeg")
# Seconds from one frame to the next, at most.
LONGEST = 3600
NO_TIMES = "its frames have no times; put it into a container: ffmpeg -i FILE -c copy FILE.mp4"
# Seconds by which a video may end before its header says.
MISSING = Fraction(1, 2)


class Info(NamedTuple):
    """Number of frames, frames per second (the mean where it varies), size in pixels as shown."""

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
    with _opened(path) as source:
        tail = collections.deque(source.frames_from(source.end - TAIL), maxlen=1)
        if not tail:
            raise ValueError("its last frame cannot be decoded")
        return _times_before(_end(tail[0], source.rate) - source.origin, frame_rate(fps))


def read_frames(
    path: str | os.PathLike, fps: float | None = None, first: int = 0
) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) uint8 RGB of a video file, one in memory at a time.

    With `fps`, the video is brought to that constant rate: at each time k / fps the last frame that
    began by then is taken, so frames are repeated or dropped, and duration and pace stay. A frame
    that is repeated is the same array again. With `first`, which needs `fps`, reading begins at
    that frame, and decoding at the last key frame before it.

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
    with _opened(path) as source:
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
            frame = next((f for f in source.frames_from(time) if _time(f) >= time), None)
            if frame is None:
                raise ValueError(f"frame {number} of {info.frames} cannot be decoded")
            yield source.rgb(frame)


def read_mp4(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """Return the frames (T, H, W, 3) uint8 RGB of a video file, and its frames per second.

    Raises ValueError if the file is no video that can be decoded.
    """
    return np.stack(list(read_frames(path))), mp4_info(path).fps


def video_stream(container: InputContainer) -> VideoStream:
    """Return the stream that a player shows. Raises ValueError if there is none; the cover picture
    of a piece of music is no video."""
    best = container.streams.best("video")
    if best is None or best.disposition & Disposition.attached_pic:
        held = ["sound"] * bool(container.streams.audio) + ["a cover picture"] * (best is not None)
        raise ValueError(f"it has {' and '.join(held) or 'neither sound'} but no video")
    return best


def shown_size(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Return the (height, width) in pixels at which a player shows a frame."""
    height, width = _square_size(frame, stream)
    return (width, height) if _Orientation.of(frame).transpose else (height, width)


class _Source:
    """An open video, whose frames can be had from the start or from any time on, in order.

    Times are in seconds, those of the file; `rate` is frames per second.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path, self.container, self.interlaced = path, None, False
        self.reopen()
        self._rest = self._decoded()
        first = next(self._rest, None)
        if first is None:
            raise ValueError("it has no frames")
        self.first, self._to_rgb = first, ColourConverter(first)

    def reopen(self) -> None:
        """Go back to the start of the file."""
        self.close()
        self.container = av.open(os.fspath(self.path))
        self.stream = video_stream(self.container)
        self.rate = self.stream.average_rate or Fraction(30)

    def close(self) -> None:
        if self.container is not None:
            self.container.close()

    @property
    def origin(self) -> Fraction:
        """When the first frame is shown."""
        return _time(self.first)

    @property
    def end(self) -> Fraction:
        """When the file ends by its header; the origin if it does not say."""
        return self.origin + Fraction(self.container.duration or 0, av.time_base)

    def frames(self) -> Iterator[av.VideoFrame]:
        """All frames, once. Raises ValueError if the file ends before its header says."""
        return self._whole(itertools.chain([self.first], self._rest))

    def frames_from(self, start: Fraction) -> Iterator[av.VideoFrame]:
        """Frames from the last key frame at or before `start` on. Raises ValueError as `frames`."""
        if self.interlaced:
            start -= 1 / self.rate  # deinterlacing needs the frame before
        if start > self.origin and self.container.format.name not in SEQUENTIAL:
            self.container.seek(math.floor(start / self.stream.time_base), stream=self.stream)
            decoded = self._decoded()
            landed = next(decoded, None)
            if landed is not None and landed.key_frame and _time(landed) <= start:
                yield from self._whole(itertools.chain([landed], decoded))
                return
        self.reopen()
        yield from self._whole(self._decoded())

    def _whole(self, frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """The frames themselves, up to the end of the file, which has to be that of its header."""
        frame = None
        for frame in frames:
            yield frame
        if frame is None:
            return
        missing = (self._said_end() or 0) - _end(frame, self.rate)
        if missing > MISSING:
            count = round((_end(frame, self.rate) - self.origin) * self.rate)
            total = count + round(missing * self.rate)
            raise ValueError(f"it is cut short: {count} of about {total} frames")

    def at_rate(self, fps: Fraction, first: int = 0) -> Iterator[tuple[av.VideoFrame, int]]:
        """Each frame with how many of the times k / fps, from k = `first` on, it is shown at."""
        frames = self.frames_from(self.origin + first / fps) if first else self.frames()
        shown = next(frames)
        for frame in itertools.chain(frames, [None]):
            end = _end(shown, self.rate) if frame is None else _after(shown, frame)
            stop = max(first, _times_before(end - self.origin, fps))
            yield shown, stop - first
            shown, first = frame, stop

    def rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """A decoded frame as shown: (H, W, 3) uint8."""
        picture = self._to_rgb(frame, *_square_size(frame, self.stream))
        return np.ascontiguousarray(_Orientation.of(frame).apply(picture))

    def _decoded(self) -> Iterator[av.VideoFrame]:
        frames = self.container.decode(self.stream)
        if _is_avi(self.container):
            frames = _timed_by_packets(self.container, self.stream)
        return _deinterlaced(map(self._sound, frames), self.stream)

    def _sound(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The frame itself. Raises ValueError if it is damaged."""
        self.interlaced |= frame.interlaced_frame
        if not frame.is_corrupt:
            return frame
        start = Fraction(self.container.start_time or 0, av.time_base)
        number = round((_time(frame) - start) * self.rate)
        total = round(Fraction(self.container.duration or 0, av.time_base) * self.rate)
        of = f" of about {total}" if total else ""
        raise ValueError(f"it is damaged or cut short at frame {number}{of}")

    def _said_end(self) -> Fraction | None:
        """When the stream ends by its header, if it has one that the frames do not depend on."""
        if self.container.format.name.startswith("mov,"):
            return None  # a damaged mp4 shows when its frames are read
        # ASF says how long a file lasts, not a stream.
        if self.stream.duration and self.container.format.name != "asf":
            start = self.stream.start_time or 0
            return (start + self.stream.duration) * self.stream.time_base
        said = _clock_seconds(self.stream.metadata.get("DURATION", ""))
        if said is None and len(self.container.streams) == 1 and self.container.duration:
            said = Fraction(self.container.duration, av.time_base)
        return said


class _Orientation(NamedTuple):
    """What brings a stored picture to its place on the screen: transposing, then mirroring."""

    transpose: bool = False
    mirror_rows: bool = False
    mirror_columns: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "_Orientation":
        """By the display matrix: a pixel (x, y) is shown at (a x + c y, b x + d y)."""
        matrix = frame.side_data.get(Type.DISPLAYMATRIX)
        if matrix is None:
            return cls()
        a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, b < 0, c < 0)
        return cls(False, d < 0, a < 0)

    def apply(self, picture: np.ndarray) -> np.ndarray:
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        rows, columns = (-1 if mirror else 1 for mirror in self[1:])
        return picture[::rows, ::columns]


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[_Source]:
    with named_video(path), contextlib.closing(_Source(path)) as source:
        yield source


def _scan(path: str | os.PathLike) -> tuple[Info, list[Fraction]]:
    """The times in seconds of all frames, by the packets, and what they say of the video."""
    with _opened(path) as source:
        source.reopen()
        timed = "dts" if _is_avi(source.container) else "pts"
        packets = coded_packets(source.container, source.stream)
        ticks = [getattr(p, timed) for p in packets if p.size and not p.is_discard]
        if None in ticks:
            raise UnsupportedVideo(NO_TIMES)
        # What comes before the first frame cannot be decoded: the file begins within it.
        every = sorted(tick * source.stream.time_base for tick in ticks)
        times = [time for time in every if time >= source.origin]
        size = shown_size(source.first, source.stream)
        return Info(len(times), float(source.rate), *size), times


def _read(path: str | os.PathLike, fps: float | None, first: int) -> Iterator[np.ndarray]:
    with _opened(path) as source:
        repeated: Iterable = ((frame, 1) for frame in source.frames())
        if fps is not None:
            repeated = source.at_rate(frame_rate(fps), first)
        for frame, times in repeated:
            picture = source.rgb(frame) if times else None
            yield from itertools.repeat(picture, times)


def _is_avi(container: InputContainer) -> bool:
    """AVI says when a frame is decoded, not when it is shown: libavformat's guesses go back in time
    if there are B-frames."""
    return container.format.name == "avi"


def _timed_by_packets(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Decoded frames with the times of the packets in order, since one packet is one frame."""
    times: collections.deque[int] = collections.deque()
    for packet in container.demux(stream):
        if packet.size:
            times.append(packet.dts)
        for frame in packet.decode():
            frame.pts = times.popleft()
            yield frame


def _deinterlaced(frames: Iterable[av.VideoFrame], stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Make frames whose rows are of two times whole by those around them; leave others alone."""
    graph, kind = None, None
    for frame in frames:
        here = frame.width, frame.height, frame.format.name
        if graph is not None and here != kind:
            yield from _pulled(graph, last=True)
            graph = None
        if graph is None and frame.interlaced_frame:
            graph, kind = _deinterlacer(frame, stream), here
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from _pulled(graph)
    if graph is not None:
        yield from _pulled(graph, last=True)


def _deinterlacer(frame: av.VideoFrame, stream: VideoStream) -> Graph:
    """libavfilter's deinterlacer for frames like this one."""
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base
    )
    bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
    return graph


def _pulled(graph: Graph, last: bool = False) -> Iterator[av.VideoFrame]:
    """The frames that a graph has ready; with `last`, all that it holds back."""
    if last:
        graph.push(None)
    with contextlib.suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.vpull()


def _after(frame: av.VideoFrame, following: av.VideoFrame) -> Fraction:
    """When the following frame is shown. Raises UnsupportedVideo if that is not soon after."""
    before, time = _time(frame), _time(following)
    if not before <= time < before + LONGEST:
        raise UnsupportedVideo(
            f"its times jump from {float(before):.2f} to {float(time):.2f} s, as if files were put"
            " one behind the other; join them with ffmpeg -f concat, or give the parts"
        )
    return time


def _time(frame: av.VideoFrame) -> Fraction:
    """When a frame is shown, in seconds."""
    if frame.pts is None:
        raise UnsupportedVideo(NO_TIMES)
    return frame.pts * frame.time_base


def _end(frame: av.VideoFrame, rate: Fraction) -> Fraction:
    """When a frame ends: by its own duration, else as is usual in a video of `rate`."""
    return _time(frame) + (frame.duration * frame.time_base if frame.duration else 1 / rate)


def _times_before(end: Fraction, fps: Fraction) -> int:
    """How many of the times 0, 1 / fps, .. come before `end`, but for rounding."""
    rounding = min(TIME_ROUNDING, 1 / (4 * fps))
    return math.floor((end - rounding) * fps) + 1


def _square_size(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(height, width) of a stored picture in square pixels, none of them lost."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if aspect >= 1:
        return frame.height, round(frame.width * aspect)
    return round(frame.height / aspect), frame.width


def _clock_seconds(text: str) -> Fraction | None:
    """Seconds of a time such as 00:00:03.200000000, None for anything else."""
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + Fraction(seconds)
    except ValueError:
        return None
