"""Requests for videos, and the layout of each on its timeline.

`make_layout` turns a `Request` and the `Geometry` of a bundle into a `Layout`: the plan of
sections, the size to sample, and the positions of key frames and end image. Requests are checked
here, before any weights are loaded.
"""

import collections
import dataclasses
import os
from collections.abc import Iterable, Mapping

import numpy as np

from framepack_jax import packing
from framepack_jax.generation.prompts import timed_prompts
from framepack_jax.packing import Section
from framepack_jax.packing.buckets import BUCKETS_480P, find_bucket
from framepack_jax.video import count_frames, read_frames, read_span, resize_center_crop

# Latent frames of a start image.
START_FRAMES = 1
# Sides of a video in pixels; H.264 needs even sides.
MIN_SIDE, MAX_SIDE = 16, 4096
# Without an image: the shape that selects the bucket, and the colour of the first frame.
TEXT_CANVAS = (480, 832)
BLANK = 0
# How an end image is used: see `Request`.
END_IMAGE_USES = ("auto", "guide", "still")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Compression, patches and buckets of a bundle.

    Args:
        schedule: Packing schedule.
        time_compression: Frames in one latent frame.
        unit: Sides of a canvas are multiples of this number of pixels.
        buckets: Sizes (height, width) in pixels that the network was trained at.
    """

    schedule: packing.Schedule
    time_compression: int
    unit: int
    buckets: tuple[tuple[int, int], ...] = BUCKETS_480P

    @property
    def source_frames(self) -> int:
        """Number of last frames of a video that are needed to continue it."""
        history = sum(segment.frames for segment in self.schedule.segments)
        reach = max(self.schedule.window, history)
        return self.time_compression * reach + 1

    def source_positions(self, before: int) -> list[int]:
        """Return the latent positions that are needed to continue a video of `before` latents."""
        reach = (self.source_frames - 1) // self.time_compression
        return [0, *range(max(1, before - reach), before)]

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


@dataclasses.dataclass(frozen=True, eq=False)
class SourceVideo:
    """Video to continue.

    Args:
        frames: Number of frames, 1 more than a multiple of the VAE's time compression.
        first: First frame (height, width, 3) uint8.
        last: Last frames (P, height, width, 3) uint8: `Geometry.source_frames`, or all if fewer.
            With `latents`, only the frames of cross-fades are needed.
        latents: Normalised latents (H, W, C) by position, if they are known.
    """

    frames: int
    first: np.ndarray
    last: np.ndarray
    latents: Mapping[int, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Content of one video. Images are (height, width, 3) uint8 of any size.

    `prompt` may change with time, "0s: she waves 4s: she bows". The video begins with `image`, or
    with `source_video`; with neither, from black, led by text alone. `key_frames` are (seconds,
    image). Times count from the start image, or from the last frame of the source video.

    `end_image_as` says what `end_image` is. "guide": one latent frame that follows the video, which
    the first generated section reads and which is not a part of the video; only an order that reads
    ahead can use it. "still": the last `time_compression` frames of the video. "auto": a guide
    if the order reads ahead, else a still.
    """

    prompt: str
    image: np.ndarray | None = None
    negative_prompt: str = ""
    seed: int = 0
    end_image: np.ndarray | None = None
    key_frames: tuple[tuple[float, np.ndarray], ...] = ()
    source_video: SourceVideo | None = None
    end_image_as: str = "auto"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Plan and positions of a video.

    Args:
        plan: Sections in order of generation.
        height, width: Size of the video in pixels.
        canvas: Sampled (height, width) in pixels; the video is its middle.
        fps: Frames per second.
        before: Number of latent frames given before the first section.
        stills: Positions of key frames, in order of the request, then of the end image. A guide
            lies at `length`, the position after the video.
    """

    plan: tuple[Section, ...]
    height: int
    width: int
    canvas: tuple[int, int]
    fps: float
    before: int
    stills: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of latent frames."""
        return packing.length(self.plan)

    @property
    def encoded(self) -> int:
        """Return the latent frames of the longest clip that is encoded: the start image, the source
        video, or a still, which is the second latent of its clip."""
        return max([self.before, *(2 for still in self.stills if still < self.length)])

    @property
    def overlap_start(self) -> int:
        """Return the first position of the clips; a source video is cross-faded from there on."""
        return min(section.decode[0] for section in self.plan)

    def new_positions(self, section: Section) -> tuple[int, ...]:
        """Return the positions that a section adds: its targets, and start or end image.

        The first section in time adds the start image, the last one the end image.
        """
        first, last = section.targets[0], section.targets[-1] + 1
        if first == START_FRAMES == self.before:
            first = 0
        if last == max(s.targets[-1] for s in self.plan) + 1:
            last = self.length
        return tuple(range(first, last))


def make_layout(
    geometry: Geometry,
    request: Request,
    *,
    seconds: float = 5.0,
    sections: int | None = None,
    fps: float = 30.0,
    height: int | None = None,
    width: int | None = None,
) -> Layout:
    """Plan the video of a request: `sections` latent windows, or the number nearest to `seconds`.

    Raises ValueError, ScheduleError.
    """
    check_seed(request.seed)
    compression, source_video = geometry.time_compression, request.source_video
    first = source_video.first if source_video else request.image
    shape = None if first is None else _check_image("image", first)
    size, canvas = geometry.sizes(shape, height, width)
    if sections is None:
        sections = packing.sections_for(seconds, geometry.schedule.window, fps, compression)
    before = START_FRAMES
    if source_video is not None:
        before = 1 + (source_video.frames - 1) // compression
        if before == START_FRAMES:
            raise ValueError(
                f"the video to extend has {source_video.frames} whole frame; at least"
                f" {1 + compression} are needed: give that frame as the start image instead"
            )
    use = end_image_use(geometry.schedule, request.end_image_as)
    ends = request.end_image is not None and geometry.schedule.reads_ahead
    plan = packing.plan(
        geometry.schedule, sections,
        before=before, after=int(ends and use == "still"), guide=ends and use == "guide",
    )  # fmt: skip
    layout = Layout(tuple(plan), *size, canvas, fps, before, ())
    end = compression * (layout.length - layout.before) / fps
    if late := [time for time, _ in timed_prompts(request.prompt) if time >= end]:
        raise ValueError(f"prompt at {late[0]:g} s: the generated video is {end:.2f} s long")
    end = layout.length if use == "guide" else layout.length - 1
    return dataclasses.replace(layout, stills=_stills(request, layout, compression, end))


def end_image_use(schedule: packing.Schedule, wanted: str) -> str:
    """Return "guide" or "still" for one of END_IMAGE_USES.

    Raises ValueError for another use, and for a guide if the order does not read ahead.
    """
    if wanted not in END_IMAGE_USES:
        raise ValueError(f"end_image_as = {wanted!r}: expected one of {', '.join(END_IMAGE_USES)}")
    if wanted == "guide" and not schedule.reads_ahead:
        raise ValueError(
            f"end_image_as = 'guide': sections in order {schedule.order!r} read no frames that come"
            " after them; take 'still', or a bundle or schedule in inverted order"
        )
    if wanted == "auto":
        return "guide" if schedule.reads_ahead else "still"
    return wanted


def _stills(request: Request, layout: Layout, compression: int, end: int) -> tuple[int, ...]:
    """Return the positions of key frames and, last, `end` for the end image. Raises ValueError."""
    stills, last = [], layout.length - 1
    taken = {}
    if request.end_image is not None:
        _check_image("end image", request.end_image)
        taken[end] = "the end image"
    for seconds, image in request.key_frames:
        name = f"key frame at {seconds:g} s"
        _check_image(name, image)
        position = layout.before - 1 + packing.position_at(seconds, layout.fps, compression)
        if not layout.before <= position <= last:
            seconds_made = compression * (last - layout.before + 1) / layout.fps
            raise ValueError(
                f"{name}: expected a time after 0 s, where the start image or the video to extend"
                f" is, up to the end at {seconds_made:.2f} s"
            )
        if position in taken:
            raise ValueError(
                f"{name} falls on the same latent frame as {taken[position]}; keep them"
                f" {compression} frames apart"
            )
        taken[position] = f"the {name}"
        stills.append(position)
    return (*stills, *([end] if request.end_image is not None else []))


def source_from_frames(
    geometry: Geometry,
    frames: Iterable[np.ndarray],
    height: int | None = None,
    width: int | None = None,
    latents: Mapping[int, np.ndarray] | None = None,
) -> SourceVideo:
    """Return the source video of frames (H, W, 3) uint8, scaled to the size of `Geometry.sizes`.

    Keeps and scales only the frames that are needed. Up to three frames at the end, which fill no
    latent, are dropped. For a file, `read_source` decodes less.

    Raises ValueError if there are no frames.
    """
    first, count, kept = None, 0, geometry.source_frames + geometry.time_compression
    last: collections.deque[np.ndarray] = collections.deque(maxlen=kept)
    for frame in frames:
        if first is None:
            first, (size, _) = frame, geometry.sizes(_check_image("frame", frame), height, width)
        last.append(frame)
        count += 1
    if first is None:
        raise ValueError("the video to extend has no frames")
    spare = (count - 1) % geometry.time_compression
    needed = list(last)[: len(last) - spare][-geometry.source_frames :]
    first, *needed = (resize_center_crop(frame, *size) for frame in (first, *needed))
    return SourceVideo(count - spare, first, np.stack(needed), latents)


def read_source(
    geometry: Geometry,
    path: str | os.PathLike,
    fps: float,
    height: int | None = None,
    width: int | None = None,
    latents: Mapping[int, np.ndarray] | None = None,
) -> SourceVideo:
    """Return the source video of a file resampled to `fps` frames per second; decode only its first
    frame and its end.

    Raises ValueError if the file is no video that can be decoded.
    """
    count = count_frames(path, fps)
    frames = count - (count - 1) % geometry.time_compression
    needed = min(frames, geometry.source_frames)
    first = next(read_frames(path, fps))
    size, _ = geometry.sizes(first.shape[:2], height, width)
    last = read_span(path, fps, frames - needed, needed, size)
    return SourceVideo(frames, resize_center_crop(first, *size), last, latents)


def fit_images(geometry: Geometry, request: Request, layout: Layout) -> Request:
    """Return the request with its images scaled and cropped to the canvas.

    `image` becomes the image that leads every section: for a source video its frame at the anchor,
    for text alone a blank.
    """

    # The canvas beyond the video is cropped at the end, so it is padded and not zoomed.
    rows, columns = layout.canvas[0] - layout.height, layout.canvas[1] - layout.width
    edges = [(rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0)]

    def fit(image: np.ndarray) -> np.ndarray:
        image = np.asarray(image)
        if image.shape[:2] == layout.canvas:
            return image
        return np.pad(resize_center_crop(image, layout.height, layout.width), edges, mode="edge")

    source_video, image = request.source_video, request.image
    if source_video is not None:
        last = np.stack([fit(frame) for frame in source_video.last])
        source_video = dataclasses.replace(source_video, first=fit(source_video.first), last=last)
        anchor = packing.anchor_position(geometry.schedule, layout.before)
        image = source_video.last[-1] if anchor else source_video.first
    elif image is None:
        image = np.full((*layout.canvas, 3), BLANK, np.uint8)
    end = request.end_image
    return dataclasses.replace(
        request,
        image=fit(image),
        end_image=None if end is None else fit(end),
        key_frames=tuple((seconds, fit(key)) for seconds, key in request.key_frames),
        source_video=source_video,
    )


def check_seed(seed: int) -> None:
    """Raise ValueError unless the seed is a number of 64 bits."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed = {seed}: expected 0 to {2**64 - 1}; for sample.py, -1 draws one")


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


def _check_image(name: str, image: np.ndarray) -> tuple[int, int]:
    """Return (height, width) of an image. Raises ValueError unless it is one."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"{name} of shape {image.shape} and type {image.dtype}: expected (height, width, 3)"
            " uint8; video.load_image reads any image file as such"
        )
    return image.shape[:2]
