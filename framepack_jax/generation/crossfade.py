"""Join clips that overlap in time to one video, in any order of generation.

Overlapping clips are cross-faded. A frame is final once all clips that cover it were added. Frames
of a clip are kept only while an overlapping neighbour is missing, so memory does not grow with the
length of the video.

Shapes: B batch, P frames, H W rows and columns.
"""

import functools
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Interval(NamedTuple):
    """Frames `start` .. `stop` - 1 of a video."""

    start: int
    stop: int


class Splicer:
    """Take clips in any order and return the frames that become final with each."""

    def __init__(self, clips: Sequence[Interval]) -> None:
        """Take the frames that each clip covers, in order of generation.

        Raises ValueError if a clip is empty, if clips leave a gap, if a clip lies inside another
        without a common end, or if three clips cover a frame.
        """
        self._clips = [Interval(*clip) for clip in clips]
        # Indices into clips by time; of equal clips, the first generated counts as the earlier.
        by_time = sorted(range(len(clips)), key=self._clips.__getitem__)
        _check([self._clips[number] for number in by_time])
        self._place = {number: place for place, number in enumerate(by_time)}
        self._by_time = by_time
        self._added: set[int] = set()
        # Joint -> frames of its first added clip; joint i lies before the i-th clip by time.
        self._held: dict[int, jax.Array] = {}

    def add(self, number: int, frames: jax.Array) -> tuple[int, jax.Array]:
        """Add clip `number`, an index into `clips`, and return the frames that became final.

        `frames` (B, P, H, W, 3) are the whole clip. Returns (first frame, frames of the same
        dtype): one interval inside the clip, possibly of 0 frames. All intervals together are the
        video, each frame once. Raises ValueError if the number does not exist or was added before,
        or if the number of frames is not that of the clip.
        """
        if number not in self._place or number in self._added:
            state = "was added before" if number in self._added else "does not exist"
            raise ValueError(f"clip {number} {state}; add each of {len(self._clips)} clips once")
        clip = self._clips[number]
        if frames.shape[1] != clip.stop - clip.start:
            raise ValueError(
                f"clip {number} has {frames.shape[1]} frames; it covers frames {clip.start} to"
                f" {clip.stop - 1}, so it must have {clip.stop - clip.start}"
            )
        self._added.add(number)
        joint = self._place[number]
        before, after = self._overlap(joint), self._overlap(joint + 1)
        head, body, tail = jnp.split(frames, [before, frames.shape[1] - after], axis=1)
        head, tail = self._meet(joint, head), self._meet(joint + 1, tail, earlier=True)
        start = clip.start + before - head.shape[1]
        return start, jnp.concatenate([head, body, tail], axis=1)

    def waiting(self, done: Iterable[int]) -> list[int]:
        """Return the clips of `done` that overlap an unfinished clip, in order of generation.

        To resume with a new Splicer, add these clips first and drop the frames that they return,
        which were final before. Later clips then return the same frames as in the first Splicer.
        Raises ValueError if a number does not exist.
        """
        done = set(done)
        if unknown := sorted(done - self._place.keys()):
            raise ValueError(f"clips {unknown} do not exist; there are {len(self._clips)}, from 0")

        def missing(joint: int, place: int) -> bool:
            return self._overlap(joint) > 0 and self._by_time[place] not in done

        places = {number: self._place[number] for number in sorted(done)}
        return [n for n, i in places.items() if missing(i, i - 1) or missing(i + 1, i + 1)]

    def _overlap(self, joint: int) -> int:
        """Return how many frames two clips share at a joint; 0 at the ends of the video."""
        if not 0 < joint < len(self._by_time):
            return 0
        earlier, later = (self._clips[n] for n in self._by_time[joint - 1 : joint + 1])
        return earlier.stop - later.start

    def _meet(self, joint: int, frames: jax.Array, earlier: bool = False) -> jax.Array:
        """Return the final frames at a joint; no frame while its other clip is missing."""
        if not frames.shape[1]:
            return frames
        if joint not in self._held:
            self._held[joint] = frames
            return frames[:, :0]
        other = self._held.pop(joint)
        pair = (frames, other) if earlier else (other, frames)
        return cross_fade(*pair, frames.shape[1])


def cross_fade(earlier: jax.Array, later: jax.Array, overlap: int, axis: int = 1) -> jax.Array:
    """Join two clips along `axis`; blend the last `overlap` frames of the earlier with the later.

    The weight of the earlier clip falls linearly from 1 to 0, both included. Returns the dtype of
    `earlier`. Raises ValueError if a clip is shorter than the overlap.
    """
    shortest = min(earlier.shape[axis], later.shape[axis])
    if not 1 <= overlap <= shortest:
        raise ValueError(f"overlap is {overlap} frames; it must be 1 to {shortest}, the short clip")
    ends = jnp.split(earlier, [earlier.shape[axis] - overlap], axis)
    starts = jnp.split(later, [overlap], axis)
    shape = [1] * earlier.ndim
    shape[axis] = overlap
    weight = jnp.linspace(1.0, 0.0, overlap).reshape(shape)
    blend = weight * ends[1] + (1.0 - weight) * starts[0]
    return jnp.concatenate([ends[0], blend.astype(earlier.dtype), starts[1]], axis)


@functools.partial(jax.jit, static_argnames=("height", "width"))
def to_uint8(frames: jax.Array, height: int | None = None, width: int | None = None) -> jax.Array:
    """Convert pixels (..., H, W, 3) in [-1, 1] to 0 .. 255, rounded and clipped, on the device.

    Larger frames are cropped to their middle `height` x `width`. Raises ValueError if frames are
    smaller.
    """
    rows, columns = frames.shape[-3:-1]
    height, width = height or rows, width or columns
    if height > rows or width > columns:
        raise ValueError(f"frames are {rows} x {columns}; {height} x {width} cannot be cut out")
    top, left = (rows - height) // 2, (columns - width) // 2
    frames = frames[..., top : top + height, left : left + width, :]
    return jnp.clip(jnp.round((frames + 1) * 127.5), 0, 255).astype(jnp.uint8)


def _check(clips: Sequence[Interval]) -> None:
    """Raise ValueError unless clips by time cover the video and overlap only their neighbours."""
    if not clips:
        raise ValueError("there are no clips; give at least one")
    for clip in clips:
        if clip.stop <= clip.start:
            raise ValueError(f"clip of frames {clip.start} to {clip.stop} (excluded) is empty")
    for earlier, later in pairwise(clips):
        if later.start > earlier.stop:
            raise ValueError(
                f"clips leave a gap: frames {earlier.stop} to {later.start - 1} are in none"
            )
        if later.stop < earlier.stop:
            raise ValueError(
                f"clip of frames {later.start} to {later.stop - 1} lies inside that of frames"
                f" {earlier.start} to {earlier.stop - 1}; one must go on after the other"
            )
    for first, third in zip(clips, clips[2:], strict=False):
        if third.start < first.stop:
            raise ValueError(
                f"three clips cover frames {third.start} to {first.stop - 1}; at most two may"
            )
