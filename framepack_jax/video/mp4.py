"""Write videos as H.264 mp4, and join them without encoding again.

Shapes: T frames, H W rows and columns. Frames are (H, W, 3) uint8 RGB.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream

from framepack_jax.utils.files import atomic_write

DEFAULT_CRF = 16
MIN_FPS, MAX_FPS = 0.1, 1000
FASTSTART = {"movflags": "+faststart"}
# Opening a file decodes its first frame, unless told not to: ten times the cost of the rest.
UNDECODED = {"skip_frame": "all"}
# Times in files are often rounded to milliseconds: a frame that is late by less is on time.
TIME_ROUNDING = Fraction(1, 1000)


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
    check_rate(fps)


def check_rate(fps: float) -> None:
    """Raise ValueError for a rate, frames per second, that no video has."""
    if not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"fps is {fps}; give {MIN_FPS} to {MAX_FPS} frames per second, usually 30")


def frame_rate(fps: float) -> Fraction:
    """Return frames per second as the fraction that files store: 23.976 is 24000/1001."""
    return Fraction(fps).limit_denominator(1001)


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
    with atomic_write(path) as partial, _h264(partial, shape[:2], fps, crf) as encode:
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
        atomic_write(path) as partial,
        av.open(partial, "w", format="mp4", options=FASTSTART) as container,
    ):
        stream = container.add_stream_from_template(template.streams.video[0])
        done = 0
        for segment in segments:
            count = 0
            for packet in _packets(segment, first.fps):
                # Each segment counts its own delay between decoding and showing, none where it is
                # short: times of decoding are made anew, so that they grow by one at the joints.
                assert packet.pts is not None
                packet.pts += done
                packet.dts = done + count - delay
                packet.stream = stream
                container.mux(packet)
                count += 1
            done += count


class UnsupportedVideo(ValueError):
    """A whole video that cannot be read as players show it; its message says what to do."""


@contextlib.contextmanager
def named_video(path: str | os.PathLike) -> Iterator[None]:
    """Turn errors of reading `path` into ValueError with its name."""
    try:
        yield
    except UnsupportedVideo as error:
        raise UnsupportedVideo(f"video {os.fspath(path)} cannot be read: {error}") from error
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(
            f"video {os.fspath(path)} cannot be read ({error}); give a whole video file"
        ) from error


@contextlib.contextmanager
def _h264(
    path: Path, size: tuple[int, int], fps: float, crf: int
) -> Iterator[Callable[[av.VideoFrame], None]]:
    """An encoder into the mp4 file `path`: a function that takes one yuv420p frame."""
    with av.open(path, "w", format="mp4", options=FASTSTART) as container:
        stream = container.add_stream("libx264", rate=frame_rate(fps), options={"crf": str(crf)})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        yield lambda frame: container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


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
    with named_video(segment), _undecoded(segment) as container:
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
    with named_video(segment), _undecoded(segment) as container:
        stream = container.streams.video[0]
        expected, count = stream.frames, 0
        for packet in coded_packets(container, stream):
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


def coded_packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """Yield the packets of a stream; the last is empty. Raises ValueError for damaged ones, but not
    in transport streams, where whole packets are marked so if files were joined."""
    strict = container.format.name != "mpegts"
    for number, packet in enumerate(container.demux(stream)):
        if packet.is_corrupt and strict:
            raise ValueError(f"it is damaged or cut short at frame {number}")
        yield packet
