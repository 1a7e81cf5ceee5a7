"""The layout of a video on its timeline: plan, size, and positions of key frames and end image.

`make_layout` turns a `Request` and the `Geometry` of a bundle into a `Layout`. Requests are checked
here, before any weights are loaded.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from framepack_jax import packing
from framepack_jax.generation.geometry import Geometry
from framepack_jax.generation.prompts import timed_prompts
from framepack_jax.generation.request import Request, check_image, check_seed
from framepack_jax.packing import Section
from framepack_jax.video import resize_center_crop

# Latent frames of a start image.
START_FRAMES = 1
# Colour of the first frame, without an image.
BLANK = 0
# How an end image is used: see `Request`.
END_IMAGE_USES = ("auto", "guide", "still")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Plan and positions of a video.

    Args:
        plan: Sections in order of generation; one pass may make two.
        height, width: Size of the video in pixels.
        canvas: Sampled (height, width) in pixels; the video is its middle.
        fps: Frames per second.
        before: Number of latent frames given before the first section.
        frames: Number of frames of the video.
        kept: Number of its first frames that are those of a source video, unchanged.
        sections: Number of sections, each a latent window long.
        stills: Positions of key frames, in order of the request, then of the end image. A guide
            lies at `length`, the position after the video.
    """

    plan: tuple[Section, ...]
    height: int
    width: int
    canvas: tuple[int, int]
    fps: float
    before: int
    frames: int
    kept: int
    sections: int
    stills: tuple[int, ...] = ()

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
        return min(first for section in self.plan for first, _ in section.decode)

    def new_positions(self, section: Section) -> tuple[int, ...]:
        """Return the positions that a section adds: its targets, and start or end image.

        The first section in time adds the start image, the last one the end image.
        """
        last = max(s.targets[-1] for s in self.plan)
        starts = self.before == START_FRAMES and section.targets[0] == self.before
        ends = section.targets[-1] == last
        return (
            *([0] if starts else []),
            *section.targets,
            *(range(last + 1, self.length) if ends else []),
        )


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
    alone = geometry.sampling.decode_alone
    first = source_video.first if source_video else request.image
    shape = None if first is None else check_image("image", first)
    size, canvas = geometry.sizes(shape, height, width)
    if sections is None:
        sections = _sections_for(geometry, seconds, fps)
    before = _before(geometry, request)
    use = end_image_use(geometry.schedule, request.end_image_as)
    ends = request.end_image is not None and geometry.schedule.reads_ahead
    plan = packing.plan(
        geometry.schedule, sections,
        before=before, after=int(ends and use == "still"), guide=ends and use == "guide",
        apart=geometry.sampling.anchor_apart and before > 0, alone=alone,
    )  # fmt: skip
    kept = 0 if source_video is None else source_video.frames
    if not alone:
        begin = min(first for section in plan for first, _ in section.decode)
        kept = geometry.frames_of(begin, before)[0]
    frames = max(last for _, last in geometry.clips(plan, kept))
    layout = Layout(tuple(plan), *size, canvas, fps, before, frames, kept, sections)
    if alone and (request.key_frames or request.end_image is not None):
        raise ValueError(
            "key frames and an end image cannot be given: this bundle decodes each section by"
            " itself; give a start image, or take a FramePack bundle"
        )
    _check_one_prompt(geometry, request, plan)
    end = (frames - kept if alone else compression * (layout.length - layout.before)) / fps
    if late := [time for time, _ in timed_prompts(request.prompt) if time >= end]:
        raise ValueError(f"prompt at {late[0]:g} s: the generated video is {end:.2f} s long")
    end = layout.length if use == "guide" else layout.length - 1
    return dataclasses.replace(layout, stills=_stills(request, layout, compression, end))


def _check_one_prompt(geometry: Geometry, request: Request, plan: Sequence[Section]) -> None:
    """Raise ValueError if prompts change within a pass that makes the beginning and the end."""
    prompts = timed_prompts(request.prompt)
    both = any(len(section.targets) > geometry.schedule.window for section in plan)
    if len(prompts) > 1 and both:
        raise ValueError(
            f"prompt at {prompts[1][0]:g} s: order {geometry.schedule.order!r} makes the beginning"
            " and the end in one pass, under one prompt; give one prompt, or the schedule with"
            f" planned endpoints: {geometry.schedule}@planned(4)"
        )


def _sections_for(geometry: Geometry, seconds: float, fps: float) -> int:
    """Return the number of sections nearest to a duration; one if sections read no context."""
    if not geometry.schedule.segments:
        return 1
    return packing.sections_for(seconds, geometry.new_frames, fps, 1)


def _before(geometry: Geometry, request: Request) -> int:
    """Return the number of latent frames given before the first section. Raises ValueError."""
    sampling, source_video = geometry.sampling, request.source_video
    if not geometry.schedule.segments:
        if source_video is not None or request.image is not None:
            raise ValueError(
                f"schedule {geometry.schedule} reads no context, so it makes videos of text alone;"
                " remove --image and --extend, or give a schedule with context"
            )
        return 0
    if source_video is None:
        if request.image is None and sampling.empty_start:
            return 0
        return START_FRAMES + sampling.anchor_apart
    if sampling.decode_alone:
        size = geometry.section_frames
        if source_video.frames < size:
            raise ValueError(
                f"the video to extend has {source_video.frames} frames; at least {size} are needed:"
                " give a frame of it as the start image instead"
            )
        return 1 + len(source_video.last) // size * geometry.schedule.window
    if packing.reads_far_back(geometry.schedule):
        raise ValueError(
            f"schedule {geometry.schedule} reads latent frames far back in the video, and only the"
            " first one and the end of a video to extend are encoded; give a schedule with the tail"
            " td and an anchor f1k1 or none"
        )
    compression = geometry.time_compression
    before = 1 + (source_video.frames - 1) // compression
    if before == START_FRAMES:
        raise ValueError(
            f"the video to extend has {source_video.frames} whole frame; at least"
            f" {1 + compression} are needed: give that frame as the start image instead"
        )
    return before


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
        check_image("end image", request.end_image)
        taken[end] = "the end image"
    for seconds, image in request.key_frames:
        name = f"key frame at {seconds:g} s"
        check_image(name, image)
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
    elif image is None and layout.before:
        image = np.full((*layout.canvas, 3), BLANK, np.uint8)
    end = request.end_image
    return dataclasses.replace(
        request,
        image=None if image is None else fit(image),
        end_image=None if end is None else fit(end),
        key_frames=tuple((seconds, fit(key)) for seconds, key in request.key_frames),
        source_video=source_video,
    )
