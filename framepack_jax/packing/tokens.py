"""Lengths: seconds, video frames, latent positions, sections and tokens."""

import math

from framepack_jax.packing.kernels import TAIL_POOL, kernel_shape, tail_of
from framepack_jax.packing.orders import TAIL_FRAMES
from framepack_jax.packing.schedule import Schedule, Segment
from framepack_jax.packing.sections import MAX_SECTIONS, pass_frames


def position_at(seconds: float, fps: float = 30, time_compression: int = 4) -> int:
    """Return the latent position of the frame at a time. The first latent stands for one frame,
    each other for `time_compression`. Raises ValueError unless the time is finite and 0 or more."""
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"time {seconds} s: expected a number of seconds, 0 or more")
    return -(-round(seconds * fps) // time_compression)


def frames_of(first: int, last: int, time_compression: int = 4) -> tuple[int, int]:
    """Return (first frame, last frame + 1) of latent positions first .. last - 1, decoded as one
    clip, whose first latent gives one frame."""
    return first * time_compression, (last - 1) * time_compression + 1


def sections_for(seconds: float, window: int, fps: float = 30, time_compression: int = 4) -> int:
    """Return the number of sections nearest to a duration (the released rule, Python's round).

    Raises ValueError unless seconds and fps are positive, finite numbers.
    """
    for name, value in (("seconds", seconds), ("fps", fps)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} = {value}: expected a positive number")
    exact = seconds * fps / (time_compression * window)
    if exact > MAX_SECTIONS + 0.5:  # which may be infinity
        raise ValueError(f"seconds = {seconds} is {exact:.3g} sections; at most {MAX_SECTIONS}")
    return max(1, round(exact))


def group_tokens(frames: int, kernel: str, height: int, width: int) -> int:
    """Count tokens of frames of (height, width) latent cells; edges are padded to the kernel. The
    frames of a tail ta are pooled first."""
    shape = kernel_shape(kernel)
    if tail_of(kernel) == "ta":
        height, width = (-(-side // TAIL_POOL) for side in (height, width))
    return math.prod(-(-n // k) for n, k in zip((frames, height, width), shape, strict=True))


def target_tokens(schedule: Schedule, height: int, width: int) -> int:
    """Count tokens of the target, which decide the flow shift; of the longest pass if an order has
    several lengths."""
    return group_tokens(max(pass_frames(schedule)), "k1", height, width)


def context_tokens(schedule: Schedule, height: int, width: int) -> list[tuple[Segment, int]]:
    """Return (segment, tokens) of all context in time order, then of the tail: the same for any
    length of video."""
    segments = [*schedule.segments]
    if schedule.tail:
        frames = TAIL_FRAMES if tail_of(schedule.tail) == "ta" else 1
        segments.append(Segment(frames, schedule.tail))
    return [(s, group_tokens(s.frames, s.kernel, height, width)) for s in segments]


def frame_bound(window: int, ratio: float = 2) -> float:
    """Return the paper's limit for the length of target and endless history, in whole frames.

    window + ratio / (ratio - 1), every older frame being `ratio` times shorter than the one after
    it (arXiv 2504.12626, section 3.1).
    """
    return window + ratio / (ratio - 1)
