"""Write videos as H.264 mp4, and concatenate or stream them without re-encoding.

Shapes: T frames, H W rows and columns. Frames are (H, W, 3) uint8 RGB.
"""

import contextlib
import io
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream

from framepack_jax.utils.files import atomic_write

DEFAULT_CRF = 16
MIN_FPS, MAX_FPS = 0.1, 1000
FASTSTART = {"movflags": "+faststart"}
# Each fragment keeps its timestamps; the header is written once the delay of the frames is known.
FRAGMENTED = {"movflags": "+delay_moov+default_base_moof+frag_keyframe+frag_discont+skip_trailer"}
# Frames that x264 holds back at the settings of `write_mp4`, at most.
DELAY = 2
# By default, opening a file decodes its first frame, which takes ten times as long as the rest.
UNDECODED = {"skip_frame": "all"}
# Tolerance in seconds for timestamps, which are often rounded to milliseconds.
TIME_ROUNDING = Fraction(1, 1000)


class _Coding(NamedTuple):
    """Encoding parameters that segments must share to form one stream.

    `header` holds the decoder's parameter sets, stored once per mp4 file.
    """

    codec: str
    height: int
    width: int
    fps: Fraction
    header: bytes


def check_encoding(fps: float, crf: int) -> None:
    """Raise ValueError if `write_mp4` would reject `fps` or `crf`; needs no frames."""
    if not 1 <= crf <= 51:
        raise ValueError(f"crf is {crf}; give 1 (best) to 51 (smallest), usually {DEFAULT_CRF}")
    check_rate(fps)


def check_rate(fps: float) -> None:
    """Raise ValueError if a frame rate in frames per second is out of range."""
    if not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"fps is {fps}; give {MIN_FPS} to {MAX_FPS} frames per second, usually 30")


def frame_rate(fps: float) -> Fraction:
    """Return a frame rate as the fraction stored in files: 24000/1001 for 23.976."""
    return Fraction(fps).limit_denominator(1001)


def write_mp4(
    path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float, crf: int = DEFAULT_CRF
) -> None:
    """Encode uint8 frames (H, W, 3), an array (T, H, W, 3) or an iterator, as H.264 yuv420p.

    Colours are converted and tagged as BT.709 in the limited range. Without tags, players guess
    the matrix from the size of the picture.

    Raises ValueError if crf is outside 1..51 (0 selects a lossless profile that players reject),
    fps is outside 0.1..1000, there are no frames, or frames have an odd or changing shape.
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


def join_mp4(
    path: str | os.PathLike,
    segments: Sequence[str | os.PathLike],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Concatenate mp4 files of `write_mp4` into one file, without re-encoding.

    The frames decode to the same bits as those of the segments. `path` may be one of the segments.
    `metadata` are tags of the file: title, comment and others that mp4 has.

    Raises ValueError and leaves `path` unchanged if there are no segments, or if a segment is
    unreadable, has no constant frame rate, or differs from the first in codec, size, frame rate or
    encoder settings.
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
        container.metadata.update(metadata or {})
        stream = container.add_stream_from_template(template.streams.video[0])
        done = 0
        for segment in segments:
            done += _append(container, stream, segment, first.fps, done, delay)


def fragment_mp4(segments: Iterable[str | os.PathLike]) -> Iterator[bytes]:
    """Yield a fragmented mp4 file piece by piece, one for each segment of `write_mp4`, without
    re-encoding: a player can show what has come while later segments are made.

    Frames and times are those of `join_mp4`. Raises ValueError as `join_mp4` does.
    """
    first, done = None, 0
    for segment in segments:
        coding, delay = _examine(segment)
        if first is None:
            first = segment, coding
        _check_same(*first, segment, coding)
        if delay > DELAY:
            raise ValueError(f"segment {os.fspath(segment)} holds {delay} frames back, not {DELAY}")
        file = io.BytesIO()
        with (
            _undecoded(segment) as template,
            av.open(file, "w", format="mp4", options=FRAGMENTED) as container,
        ):
            stream = container.add_stream_from_template(template.streams.video[0])
            count = _append(container, stream, segment, coding.fps, done, DELAY)
        headers = (b"ftyp", b"moov") if done == 0 else ()
        kept = (*headers, b"moof", b"mdat")
        yield b"".join(box for kind, box in _boxes(file.getvalue()) if kind in kept)
        done += count


def _append(
    container: OutputContainer,
    stream: VideoStream,
    segment: str | os.PathLike,
    fps: Fraction,
    done: int,
    delay: int,
) -> int:
    """Add the frames of a segment after `done` others; return their number.

    The delay from decoding to display differs by segment (0 for short ones). Decoding times are
    therefore recounted, so that they increase by one across segments.
    """
    count = 0
    for packet in _packets(segment, fps):
        assert packet.pts is not None
        packet.pts += done
        packet.dts = done + count - delay
        packet.stream = stream
        container.mux(packet)
        count += 1
    return count


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind and the bytes of each outermost box of an mp4 file."""
    start = 0
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        yield kind, data[start : start + size]
        start += size


def read_tags(path: str | os.PathLike) -> dict[str, str]:
    """Return the tags of a video file. Raises ValueError if it is no video."""
    with named_video(path), _undecoded(path) as container:
        return dict(container.metadata)


class UnsupportedVideo(ValueError):
    """An intact video in an unsupported format. The message includes the remedy."""


@contextlib.contextmanager
def named_video(path: str | os.PathLike) -> Iterator[None]:
    """Convert errors while reading `path` to ValueError with its name."""
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
    """Yield a function that encodes one yuv420p frame into the mp4 file `path`."""
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
    """Convert an RGB frame of `shape` to yuv420p."""
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
    """Return the encoding parameters of a segment, and its decoding delay in frames."""
    with named_video(segment), _undecoded(segment) as container:
        stream = container.streams.video[0]
        codec, fps = stream.codec_context, stream.average_rate
        first = next(container.demux(stream))
        if not fps or first.dts is None:
            raise ValueError(f"it has no frames, or its frame rate is {fps}")
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
    """Yield the encoded frames of a segment in decoding order, with timestamps in frames."""
    with named_video(segment), _undecoded(segment) as container:
        stream = container.streams.video[0]
        expected, count = stream.frames, 0
        for packet in coded_packets(container, stream):
            if not packet.size:
                continue
            count += 1
            if packet.pts is None:
                raise ValueError("its frames have no timestamps")
            time = packet.pts * packet.time_base * fps
            if time.denominator != 1:
                raise ValueError(f"its frame rate varies: a frame at {float(time)} / {fps} s")
            packet.time_base, packet.pts, packet.duration = 1 / fps, int(time), 1
            yield packet
        if count < expected:
            raise ValueError(f"it is cut short: {count} of {expected} frames")


def coded_packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """Yield the packets of a stream; the last is empty.

    Raises ValueError for a damaged packet. Transport streams are exempt, because joined files mark
    intact packets as damaged.
    """
    strict = container.format.name != "mpegts"
    for number, packet in enumerate(container.demux(stream)):
        if packet.is_corrupt and strict:
            raise ValueError(f"it is damaged or cut short at frame {number}")
        yield packet
