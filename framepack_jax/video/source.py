"""An open video file, decoded as a player shows it."""

import collections
import glob
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from framepack_jax.video.colour import ColourConverter
from framepack_jax.video.deinterlace import deinterlaced
from framepack_jax.video.orientation import Orientation, square_size
from framepack_jax.video.times import clock_seconds, end_of, time_after, time_of, times_before

# Formats of libavformat in which times after a seek are guessed: they are read from the start.
SEQUENTIAL = ("avi", "mpeg")
# Kinds of pictures in a folder of frames, and frames per second if none are given.
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
DEFAULT_FPS = 30
# Seconds by which a video may end before its header says.
MAX_MISSING = Fraction(1, 2)


class Source:
    """An open video: its frames in order, from the start or from any time on.

    Times are in seconds, those of the file; `rate` is frames per second.
    """

    def __init__(self, path: str | os.PathLike, fps: float | None = None) -> None:
        """Open a video file, or a folder of pictures, which are shown at `fps` (default: 30) in the
        order of their names. Raises ValueError, OSError, or an error of av."""
        self.path, self.interlaced = path, False
        self._fps = Fraction(fps or DEFAULT_FPS).limit_denominator(1001)
        self._open()
        self._rest = self._decoded()
        first = next(self._rest, None)
        if first is None:
            raise ValueError("it has no frames")
        self.first, self._to_rgb = first, ColourConverter(first)

    def reopen(self) -> None:
        """Go back to the start of the file."""
        self.close()
        self._open()

    def _open(self) -> None:
        self.container = self._opened()
        self.stream = video_stream(self.container)
        self.rate = self.stream.average_rate or Fraction(30)
        self._tick = self.stream.time_base or Fraction(1)

    def _opened(self) -> InputContainer:
        if not os.path.isdir(self.path):
            return av.open(os.fspath(self.path))
        options = {"pattern_type": "glob", "framerate": str(self._fps)}
        return av.open(picture_pattern(self.path), format="image2", options=options)

    def close(self) -> None:
        self.container.close()

    @property
    def origin(self) -> Fraction:
        """Time of the first frame."""
        return time_of(self.first)

    @property
    def end(self) -> Fraction:
        """End of the file by its header; the origin if the header does not state it."""
        return self.origin + Fraction(self.container.duration or 0, av.time_base)

    def frames(self) -> Iterator[av.VideoFrame]:
        """Yield all frames, once. Raises ValueError if the file is shorter than its header says."""
        return self._checked(itertools.chain([self.first], self._rest))

    def frames_from(self, start: Fraction) -> Iterator[av.VideoFrame]:
        """Yield frames from the last key frame at or before `start` on. Raises ValueError like
        `frames`."""
        if self.interlaced:
            start -= 1 / self.rate  # deinterlacing needs the frame before
        if start > self.origin and self.container.format.name not in SEQUENTIAL:
            self.container.seek(math.floor(start / self._tick), stream=self.stream)
            decoded = self._decoded()
            landed = next(decoded, None)
            if landed is not None and landed.key_frame and time_of(landed) <= start:
                yield from self._checked(itertools.chain([landed], decoded))
                return
        self.reopen()
        yield from self._checked(self._decoded())

    def _checked(self, frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """Yield the frames. Raises ValueError if they end before the header says."""
        frame = None
        for frame in frames:
            yield frame
        if frame is None:
            return
        missing = (self._stated_end() or 0) - end_of(frame, self.rate)
        if missing > MAX_MISSING:
            count = round((end_of(frame, self.rate) - self.origin) * self.rate)
            total = count + round(missing * self.rate)
            raise ValueError(f"it is cut short: {count} of about {total} frames")

    def at_rate(self, fps: Fraction, first: int = 0) -> Iterator[tuple[av.VideoFrame, int]]:
        """Yield each frame with the number of times k / fps, from k = `first` on, that show it."""
        frames = self.frames_from(self.origin + first / fps) if first else self.frames()
        shown = next(frames)
        for frame in frames:
            stop = max(first, times_before(time_after(shown, frame) - self.origin, fps))
            yield shown, stop - first
            shown, first = frame, stop
        stop = max(first, times_before(end_of(shown, self.rate) - self.origin, fps))
        yield shown, stop - first

    def rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Convert a decoded frame to (H, W, 3) uint8 as shown."""
        picture = self._to_rgb(frame, *square_size(frame, self.stream))
        return np.ascontiguousarray(Orientation.of(frame).apply(picture))

    def _decoded(self) -> Iterator[av.VideoFrame]:
        frames = self.container.decode(self.stream)
        if is_avi(self.container):
            frames = timed_by_packets(self.container, self.stream)
        return deinterlaced(map(self._intact, frames), self.stream)

    def _intact(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Return the frame. Raises ValueError if it is damaged."""
        self.interlaced |= frame.interlaced_frame
        if not frame.is_corrupt:
            return frame
        start = Fraction(self.container.start_time or 0, av.time_base)
        number = round((time_of(frame) - start) * self.rate)
        total = round(Fraction(self.container.duration or 0, av.time_base) * self.rate)
        of = f" of about {total}" if total else ""
        raise ValueError(f"it is damaged or cut short at frame {number}{of}")

    def _stated_end(self) -> Fraction | None:
        """Return the end of the stream by its header; None unless it is stated apart from the
        frames."""
        if self.container.format.name.startswith("mov,"):
            return None  # a damaged mp4 shows when its frames are read
        # ASF states the duration of the file, not of a stream.
        if self.stream.duration and self.container.format.name != "asf":
            start = self.stream.start_time or 0
            return (start + self.stream.duration) * self._tick
        said = clock_seconds(self.stream.metadata.get("DURATION", ""))
        if said is None and len(self.container.streams) == 1 and self.container.duration:
            said = Fraction(self.container.duration, av.time_base)
        return said


def picture_pattern(folder: str | os.PathLike) -> str:
    """Return a pattern that names the pictures of a folder. Raises ValueError if it has none, or
    pictures of several kinds, whose order would not be clear."""
    names = sorted(os.listdir(folder))
    kinds = {os.path.splitext(name)[1] for name in names} & {*PICTURES, *map(str.upper, PICTURES)}
    if len(kinds) != 1:
        found = " and ".join(sorted(kinds)) or "none"
        raise ValueError(
            f"it is no run folder, and a folder of frames needs pictures of one kind"
            f" ({', '.join(PICTURES)}), not {found}"
        )
    return f"{glob.escape(os.fspath(folder))}/*{kinds.pop()}"


def video_stream(container: InputContainer) -> VideoStream:
    """Return the stream that a player shows. Raises ValueError if there is none; a cover picture of
    a music file does not count."""
    best = container.streams.best("video")
    if best is None or best.disposition & Disposition.attached_pic:
        held = ["sound"] * bool(container.streams.audio) + ["a cover picture"] * (best is not None)
        raise ValueError(f"it has {' and '.join(held) or 'neither sound'} but no video")
    assert isinstance(best, VideoStream)
    return best


def is_avi(container: InputContainer) -> bool:
    """Return True for AVI, which states when a frame is decoded, not when it is shown: the times
    that libavformat guesses go back if there are B-frames."""
    return container.format.name == "avi"


def timed_by_packets(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Yield decoded frames with the times of the packets in order; one packet is one frame."""
    times: collections.deque[int | None] = collections.deque()
    for packet in container.demux(stream):
        if packet.size:
            times.append(packet.dts)
        for frame in packet.decode():
            frame.pts = times.popleft()
            yield frame
