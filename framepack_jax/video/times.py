"""Times of decoded frames, in seconds of the file."""

import math
from fractions import Fraction

import av

from framepack_jax.video.mp4 import UnsupportedVideo

# Tolerance in seconds for timestamps, which are often rounded to milliseconds.
TIME_ROUNDING = Fraction(1, 1000)
# Maximum seconds from one frame to the next.
MAX_GAP = 3600
NO_TIMES = "its frames have no times; put it into a container: ffmpeg -i FILE -c copy FILE.mp4"


def time_of(frame: av.VideoFrame) -> Fraction:
    """Return when a frame is shown, in seconds."""
    if frame.pts is None or frame.time_base is None:
        raise UnsupportedVideo(NO_TIMES)
    return frame.pts * frame.time_base


def end_of(frame: av.VideoFrame, rate: Fraction) -> Fraction:
    """Return when a frame ends: by its own duration, or by the frame rate if it has none."""
    start = time_of(frame)
    assert frame.time_base is not None
    return start + (frame.duration * frame.time_base if frame.duration else 1 / rate)


def time_after(frame: av.VideoFrame, following: av.VideoFrame) -> Fraction:
    """Return when the following frame is shown. Raises UnsupportedVideo if times jump."""
    before, time = time_of(frame), time_of(following)
    if not before <= time < before + MAX_GAP:
        raise UnsupportedVideo(
            f"its times jump from {float(before):.2f} to {float(time):.2f} s, as in files that were"
            " simply appended; join them with ffmpeg -f concat, or give the parts"
        )
    return time


def times_before(end: Fraction, fps: Fraction) -> int:
    """Return how many of the times 0, 1 / fps, .. come before `end`, but for rounding."""
    rounding = min(TIME_ROUNDING, 1 / (4 * fps))
    return math.floor((end - rounding) * fps) + 1


def clock_seconds(text: str) -> Fraction | None:
    """Parse a time such as 00:00:03.200000000; None for anything else."""
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + Fraction(seconds)
    except ValueError:
        return None
