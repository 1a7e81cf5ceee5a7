"""Look at a video file before it is decoded."""

from pathlib import Path
from typing import NamedTuple

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from framepack_jax.data.rejected import Rejected
from framepack_jax.video import check_colours, shown_size, video_stream


class Probe(NamedTuple):
    """Size as shown in pixels, and duration; None if the file does not state it."""

    height: int
    width: int
    seconds: float | None


def probe(path: Path) -> Probe:
    """Read the size and duration of a video, decoding one frame. Raises Rejected."""
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
