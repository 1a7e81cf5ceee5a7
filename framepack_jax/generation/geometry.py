"""Geometry of the videos of a bundle: compression, sizes, and how sections follow each other."""

import dataclasses
from collections.abc import Sequence

from framepack_jax import packing
from framepack_jax.bundle import Sampling
from framepack_jax.packing import Section
from framepack_jax.packing.buckets import BUCKETS_480P, find_bucket

# Sides of a video in pixels; H.264 needs even sides.
MIN_SIDE, MAX_SIDE = 16, 4096
# Without an image: the shape that selects the bucket.
TEXT_CANVAS = (480, 832)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Compression, patches and buckets of a bundle.

    Args:
        schedule: Packing schedule.
        time_compression: Frames in one latent frame.
        unit: Sides of a canvas are multiples of this number of pixels.
        buckets: Sizes (height, width) in pixels that the network was trained at.
        sampling: How videos are sampled.
    """

    schedule: packing.Schedule
    time_compression: int
    unit: int
    buckets: tuple[tuple[int, int], ...] = BUCKETS_480P
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    @property
    def section_frames(self) -> int:
        """Number of frames of a section that is decoded alone."""
        return self.frames_of(0, self.schedule.window)[1]

    @property
    def new_frames(self) -> int:
        """Number of frames that a section adds to a video."""
        if self.sampling.decode_alone or not self.schedule.segments:
            return self.section_frames
        return self.schedule.window * self.time_compression

    @property
    def source_frames(self) -> int:
        """Number of last frames of a video that are needed to continue it: whole sections if they
        are decoded alone."""
        history = sum(segment.frames for segment in self.schedule.segments)
        if self.sampling.decode_alone:
            return -(-history // self.schedule.window) * self.section_frames
        reach = max(self.schedule.window, history)
        return self.time_compression * reach + 1

    def source_positions(self, before: int) -> list[int]:
        """Return the latent positions that are needed to continue a video of `before` latents."""
        if self.sampling.decode_alone:
            return list(range(before))
        reach = (self.source_frames - 1) // self.time_compression
        return [0, *range(max(1, before - reach), before)]

    def clips(self, plan: Sequence[Section], given: int = 0) -> list[tuple[int, int]]:
        """Return the frames (first, last + 1) of all clips, section by section. Sections that are
        decoded alone follow each other after `given` frames of a source video."""
        if not self.sampling.decode_alone:
            return [self.frames_of(*clip) for section in plan for clip in section.decode]
        size, begin = self.section_frames, min(section.targets[0] for section in plan)
        numbers = [(section.targets[0] - begin) // self.schedule.window for section in plan]
        return [(given + i * size, given + (i + 1) * size) for i in numbers]

    def middle(self, section: Section, before: int) -> float:
        """Return the frame in the middle of a section, counted from the start image or the end of
        the source video, for `before` given latents."""
        if self.sampling.decode_alone:
            number = (section.targets[0] - before) // self.schedule.window
            return (number + 0.5) * self.section_frames
        middle = (section.targets[0] - 1 + section.targets[-1]) / 2 - (before - 1)
        return self.time_compression * middle

    def frames_of(self, first: int, last: int) -> tuple[int, int]:
        """Return the frames of latent positions first .. last - 1, see `packing.frames_of`."""
        return packing.frames_of(first, last, self.time_compression)

    def sizes(
        self, shape: tuple[int, int] | None, height: int | None = None, width: int | None = None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (height, width) in pixels of a video, and of the canvas that is sampled for it.

        Without height and width, the `shape` of the image, if any, selects the bucket. Raises
        ValueError if a video cannot have that size.
        """
        if height is None and width is None:
            height, width = find_bucket(*(shape or TEXT_CANVAS), self.buckets)
        size = check_size(height, width)
        rows, columns = (-(-side // self.unit) * self.unit for side in size)
        return size, (rows, columns)

    def source_used(self, count: int) -> tuple[int, int]:
        """Return how many of the first frames of a video of `count` frames are continued, and how
        many of the last of these are needed."""
        if self.sampling.decode_alone:
            size = self.section_frames
            return count, min(count // size * size, self.source_frames)
        used = count - (count - 1) % self.time_compression
        return used, min(used, self.source_frames)


def check_size(height: int | None, width: int | None) -> tuple[int, int]:
    """Return (height, width) in pixels. Raises ValueError unless a video can have that size."""
    if height is None or width is None:
        raise ValueError(f"height = {height}, width = {width}: give both or neither")
    for name, side in (("height", height), ("width", width)):
        if not MIN_SIDE <= side <= MAX_SIDE or side % 2:
            raise ValueError(
                f"{name} = {side} pixels: expected an even number from {MIN_SIDE} to {MAX_SIDE}"
            )
    return height, width
