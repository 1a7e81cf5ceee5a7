"""Videos in and out: H.264 mp4 written, joined without encoding again, and read frame by frame.

Shapes: T frames, H W rows and columns. Frames are (H, W, 3) uint8 RGB.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from framepack_jax.video.files import whole
from framepack_jax.video.images import resize_center_crop

DEFAULT_CRF = 16
MIN_FPS, MAX_FPS = 0.1, 1000
FASTSTART = {"movflags": "+faststart"}
# Opening a file decodes its first frame, unless told not to: ten times the cost of the rest.
UNDECODED = {"skip_frame": "all"}
# Times in files are often rounded to milliseconds: a frame that is late by less is on time.
TIME_ROUNDING = Fraction(1, 1000)


class Info(NamedTuple):
    """Number of frames, frames per second (the mean where it varies), size in pixels as shown."""

    frames: int
    fps: float
    height: int
    width: int


class _Coding(NamedTuple):
    """What segments must share to be one stream. `header` has the decoder's parameter sets, which
    an mp4 file has once."""

    codec: str
    height: int
    width: int
    fps: Fraction
    header: bytes


def check_encoding(fps: float, crf: int) -> None:
    """Raise ValueError for what `write_mp4` would refuse, before there are any frames."""
    if not 1 <= crf <= 51:
        raise ValueError(f"crf is {crf}; give 1 (best) to 51 (smallest), usually {DEFAULT_CRF}")
    if not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"fps is {fps}; give {MIN_FPS} to {MAX_FPS} frames per second, usually 30")


def write_mp4(
    path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float, crf: int = DEFAULT_CRF
) -> None:
    """Encode uint8 frames (H, W, 3), an array (T, H, W, 3) or an iterator, as H.264 yuv420p.

    Colours are converted by BT.709 in the limited range, and tagged so: without tags, players
    guess from the size of the picture. Raises ValueError for crf outside 1..51 (0 is a lossless
    profile that players refuse), fps outside 0.1..1000, no frames, and frames of odd or changing
    shape.
    """
    check_encoding(fps, crf)
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"there are no frames to write to {os.fspath(path)}")
    shape = np.shape(first)
    if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
        raise ValueError(f"frames are {shape}; mp4 needs (H, W, 3) with an even height and width")
    with whole(path) as partial, _h264(partial, shape[:2], fps, crf) as encode:
        encode(_yuv(first, shape))
        for frame in frames:
            encode(_yuv(frame, shape))


def join_mp4(path: str | os.PathLike, segments: Sequence[str | os.PathLike]) -> None:
    """Put mp4 files that `write_mp4` wrote one after another into one, without encoding again.

    The frames decode to the same bits as those of the segments. `path` may be one of them. Raises
    ValueError, and leaves `path` as it was, where there are no segments or one cannot be read, has
    no constant rate, or differs from the first in codec, size, rate or encoder settings.
    """
    if not segments:
        raise ValueError(f"there are no segments to join into {os.fspath(path)}")
    first, delay = _examine(segments[0])
    for segment in segments[1:]:
        coding, its_delay = _examine(segment)
        _check_same(segments[0], first, segment, coding)
        delay = max(delay, its_delay)
    with (
        _undecoded(segments[0]) as template,
        whole(path) as partial,
        av.open(partial, "w", format="mp4", options=FASTSTART) as container,
    ):
        stream = container.add_stream_from_template(template.streams.video[0])
        done = 0
        for segment in segments:
            count = 0
            for packet in _packets(segment, first.fps):
                # Each segment counts its own delay between decoding and showing, none where it is
                # short: times of decoding are made anew, so that they grow by one at the joints.
                packet.pts += done
                packet.dts = done + count - delay
                packet.stream = stream
                container.mux(packet)
                count += 1
            done += count


def mp4_info(path: str | os.PathLike) -> Info:
    """How many frames a video file has, counted exactly, and of what size; decodes only the first.

    Raises ValueError where the file is no video that can be decoded.
    """
    return _scan(path)[0]


def read_frames(path: str | os.PathLike, fps: float | None = None) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) uint8 RGB of a video file, upright, one in memory at a time.

    With `fps`, the video is brought to that constant rate: at each time k / fps the last frame that
    began by then is taken, so frames are repeated or dropped, and duration and pace stay. Raises
    ValueError where the file is no video that can be decoded (when that shows), and for fps out of
    0.1..1000.
    """
    if fps is not None:
        check_encoding(fps, DEFAULT_CRF)
    return _read(path, fps)


def read_span(
    path: str | os.PathLike, fps: float, first: int, count: int, size: tuple[int, int]
) -> np.ndarray:
    """Frames `first` .. `first + count - 1` (count, height, width, 3) uint8 RGB of a video brought
    to a constant rate as by `read_frames`, scaled and cut to `size` (height, width).

    Decodes from the last key frame before them. Raises ValueError where the file is no video that
    can be decoded, or ends before.
    """
    rate, frames = _rate(fps), []
    with _named(path), av.open(os.fspath(path)) as container:
        stream = container.streams.video[0]
        origin = next(container.decode(stream)).pts
        start = origin + int(first / rate / stream.time_base)
        container.seek(start, stream=stream)
        decoded = container.decode(stream)
        for frame, shown in _repeats(decoded, stream.average_rate, rate, origin, first):
            if shown:
                picture = resize_center_crop(_rgb(frame), *size)
                frames += [picture] * min(shown, count - len(frames))
            if len(frames) == count:
                return np.stack(frames)
        raise ValueError(f"it ends before frame {first + count - 1} at {fps} frames a second")


def read_frames_at(path: str | os.PathLike, numbers: Iterable[int]) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) uint8 RGB of these numbers, counted from 0: fast where they are few.

    Raises ValueError where the file is no video that can be decoded, or has no such frame.
    """
    info, times = _scan(path)
    with _named(path), av.open(os.fspath(path)) as container:
        stream = container.streams.video[0]
        for number in numbers:
            if not 0 <= number < info.frames:
                raise ValueError(f"frame {number} of {info.frames} does not exist")
            container.seek(times[number], stream=stream)
            at_or_after = (f for f in container.decode(stream) if f.pts >= times[number])
            frame = next(at_or_after, None)
            if frame is None:
                raise ValueError(f"frame {number} of {info.frames} cannot be decoded")
            yield _rgb(frame)


def read_mp4(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """Frames (T, H, W, 3) uint8 RGB of a video file, and its frames per second.

    Raises ValueError where the file is no video that can be decoded.
    """
    return np.stack(list(read_frames(path))), mp4_info(path).fps


@contextlib.contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    """Errors of reading `path` as ValueError with its name."""
    try:
        yield
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(
            f"video {os.fspath(path)} cannot be read ({error}); give a whole mp4 file"
        ) from error


@contextlib.contextmanager
def _h264(
    path: Path, size: tuple[int, int], fps: float, crf: int
) -> Iterator[Callable[[av.VideoFrame], None]]:
    """An encoder into the mp4 file `path`: a function that takes one yuv420p frame."""
    with av.open(path, "w", format="mp4", options=FASTSTART) as container:
        stream = container.add_stream("libx264", rate=_rate(fps), options={"crf": str(crf)})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        yield lambda frame: container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def _yuv(frame: np.ndarray, shape: tuple[int, ...]) -> av.VideoFrame:
    """An RGB frame of `shape` as the encoder wants it."""
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.shape != shape:
        raise ValueError(f"frame is {frame.dtype} {frame.shape}, expected uint8 {shape}")
    return av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC,
    )


def _undecoded(path: str | os.PathLike) -> InputContainer:
    return av.open(os.fspath(path), options=UNDECODED)


def _examine(segment: str | os.PathLike) -> tuple[_Coding, int]:
    """What a segment shares with others, and how many frames before the first one shown its
    decoder has to start."""
    with _named(segment), _undecoded(segment) as container:
        stream = container.streams.video[0]
        codec, fps = stream.codec_context, stream.average_rate
        first = next(container.demux(stream))
        if not fps or first.dts is None:
            raise ValueError(f"no frames, or rate {fps}")
        header = bytes(codec.extradata or b"")
        coding = _Coding(codec.name, codec.height, codec.width, fps, header)
        return coding, -round(first.dts * first.time_base * fps)


def _check_same(
    first: str | os.PathLike, expected: _Coding, segment: str | os.PathLike, coding: _Coding
) -> None:
    if coding == expected:
        return

    def described(c: _Coding) -> str:
        return f"{c.codec}, {c.height} x {c.width} pixels, {c.fps} fps"

    if coding[:-1] == expected[:-1]:
        difference = "was encoded with other settings or another encoder than"
    else:
        difference = f"is {described(coding)}, not {described(expected)} as is"
    raise ValueError(
        f"segment {os.fspath(segment)} {difference} {os.fspath(first)}; write all segments with"
        " write_mp4 and the same size, fps and crf"
    )


def _packets(segment: str | os.PathLike, fps: Fraction) -> Iterator[av.Packet]:
    """The coded frames of a segment in the order of decoding, their times in frames."""
    with _named(segment), _undecoded(segment) as container:
        expected, count = container.streams.video[0].frames, 0
        for packet in _coded(container):
            if not packet.size:
                continue
            count += 1
            if packet.pts is None:
                raise ValueError("its frames have no times")
            time = packet.pts * packet.time_base * fps
            if time.denominator != 1:
                raise ValueError(f"its rate is not constant: a frame at {float(time)} / {fps} s")
            packet.time_base, packet.pts, packet.duration = 1 / fps, int(time), 1
            yield packet
        if count < expected:
            raise ValueError(f"it is cut short: {count} of {expected} frames")


def _coded(container: InputContainer) -> Iterator[av.Packet]:
    """The packets of the first video stream; the last is empty. Raises ValueError for cut ones."""
    for number, packet in enumerate(container.demux(video=0)):
        if packet.is_corrupt:
            raise ValueError(f"it is damaged or cut short at frame {number}")
        yield packet


def _scan(path: str | os.PathLike) -> tuple[Info, list[int]]:
    """Of all frames the number and, in the stream's ticks, the times; of the first the size."""
    size, times = None, []
    with _named(path), av.open(os.fspath(path)) as container:
        rate = container.streams.video[0].average_rate
        for packet in _coded(container):
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
            if size is None:
                size = next((_shown_size(frame) for frame in packet.decode()), None)
        if size is None or not rate:
            raise ValueError(f"{len(times)} frames at rate {rate}")
        if None in times:
            raise ValueError("its frames have no times")
    return Info(len(times), float(rate), *size), sorted(times)


def _read(path: str | os.PathLike, fps: float | None) -> Iterator[np.ndarray]:
    with _named(path), av.open(os.fspath(path)) as container:
        stream, count = container.streams.video[0], 0
        decoded = container.decode(stream)
        repeated = ((frame, 1) for frame in decoded)
        if fps is not None:
            repeated = _repeats(decoded, stream.average_rate, _rate(fps))
        for frame, times in repeated:
            if times:
                picture = _rgb(frame)
            for _ in range(times):
                count += 1
                yield picture
        if not count:
            raise ValueError("it has no frames")


def _repeats(
    frames: Iterable[av.VideoFrame],
    rate: Fraction | None,
    fps: Fraction,
    begins: int | None = None,
    k: int = 0,
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Each frame with how many of the times k / fps, `k` and on, it is shown at; counted from the
    video's first frame, whose time is `begins`, by default the first of `frames`.

    The last lasts as long as it says, else as is usual in a video of `rate` frames per second.
    """
    shown, origin = None, None
    for frame in frames:
        if frame.pts is None:
            raise ValueError("its frames have no times")
        time = frame.pts * frame.time_base
        if origin is None:
            origin = time if begins is None else begins * frame.time_base
        if shown is not None:
            stop = _times_before(time - origin, fps)
            yield shown, max(0, stop - k)
            k = max(k, stop)
        shown = frame
    if shown is not None:
        length = shown.duration * shown.time_base if shown.duration else 1 / (rate or fps)
        stop = _times_before(time - origin + length, fps)
        yield shown, max(0, stop - k)


def _times_before(end: Fraction, fps: Fraction) -> int:
    """How many of the times 0, 1 / fps, .. come before `end`, but for rounding."""
    rounding = min(TIME_ROUNDING, 1 / (4 * fps))
    return math.floor((end - rounding) * fps) + 1


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame upright in full-range RGB, by the matrix and range it is tagged with."""
    picture = frame.reformat(format="rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, _quarter_turns(frame)))


def _shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    size = frame.height, frame.width
    return size[::-1] if _quarter_turns(frame) % 2 else size


def _quarter_turns(frame: av.VideoFrame) -> int:
    """How often a frame has to be turned by 90 degrees counterclockwise to stand upright."""
    return round(frame.rotation / 90)
