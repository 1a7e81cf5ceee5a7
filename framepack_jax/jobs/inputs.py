"""Read the inputs of a video, images and source videos, and make its layout."""

import itertools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from framepack_jax import video
from framepack_jax.diffusion.recipe import Recipe
from framepack_jax.generation.layout import Layout, make_layout
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.generation.prompts import timed_prompts
from framepack_jax.generation.request import Request, SourceVideo, read_source
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.jobs.spec import SPEC_FIELDS, VideoSpec, is_run, source_file
from framepack_jax.parallel.multihost import is_primary
from framepack_jax.utils.progress import Bar

logger = logging.getLogger(__name__)


def read_request(pipe: FramePack, spec: VideoSpec) -> Request:
    """Read the images and the video of a spec. Raises ValueError, OSError."""
    if spec.image is not None and spec.extend is not None:
        raise ValueError("--image and --extend exclude each other; give one of them")
    if spec.image is None and spec.extend is None and not spec.prompt.strip():
        raise ValueError("nothing to make a video from: give --image, --extend or a --prompt")
    key_frames = (
        (seconds, video.load_image(path)) for seconds, path in map(_key_frame, spec.key_frame)
    )
    return Request(
        prompt=spec.prompt,
        image=None if spec.image is None else video.load_image(spec.image),
        negative_prompt=spec.negative_prompt or "",
        seed=spec.seed,
        end_image=None if spec.end_image is None else video.load_image(spec.end_image),
        end_image_as=spec.end_image_as,
        key_frames=tuple(sorted(key_frames, key=lambda key: key[0])),
        source_video=None if spec.extend is None else _read_source(pipe, spec, spec.extend),
    )


def _key_frame(text: str) -> tuple[float, str]:
    """Parse 3.5s=photo.png. Raises ValueError."""
    time, equals, path = text.partition("=")
    try:
        seconds = float(time.strip().removesuffix("s"))
    except ValueError:
        equals = ""
    if not equals or not path:
        raise ValueError(f"key frame {text!r}: expected a time and an image, 3.5s=photo.png")
    return seconds, path


def fps_of(spec: VideoSpec) -> float:
    """Return the frames per second of options that are `filled`."""
    assert spec.fps is not None
    return spec.fps


def layout_of_spec(pipe: FramePack, spec: VideoSpec, request: Request) -> Layout:
    """Lay out the video of a spec. Raises ValueError if its options contradict each other."""
    height, width = spec.height, spec.width
    if request.source_video is not None:
        height, width = request.source_video.first.shape[:2]
    return make_layout(
        pipe.geometry, request, seconds=spec.seconds, sections=spec.sections, fps=fps_of(spec),
        height=height, width=width,
    )  # fmt: skip


def read_inputs(
    pipe: FramePack, spec: VideoSpec, layout: Layout, request: Request | None
) -> tuple[Request, Iterator[np.ndarray] | None]:
    """Return the request, and the frames of an extended video that no section changes."""
    request = request or read_request(pipe, spec)
    if not layout.kept or spec.extend is None:
        return request, None
    return request, _read_kept(
        spec.extend, fps_of(spec), layout.kept, (layout.height, layout.width)
    )


def _read_kept(extend: Path, fps: float, count: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the first `count` frames of an extended video, scaled, behind a progress bar."""
    frames = itertools.islice(video.read_frames(source_file(extend), fps), count)
    for frame in Bar(frames, "copying", count, leave=False, unit="frame", disable=not is_primary()):
        yield video.resize_center_crop(frame, *size)


def saved_spec(run: RunDir) -> VideoSpec:
    """Return the options that a run was started with."""
    flags = {k: v for k, v in run.record["flags"].items() if k in SPEC_FIELDS}
    return VideoSpec(**flags | {"key_frame": tuple(flags["key_frame"])})


def saved_layout(pipe: FramePack, run: RunDir) -> Layout:
    """Return the layout that a run was started with."""
    record = run.record
    return make_layout(
        pipe.geometry, run.request(), sections=record["sections"], fps=record["flags"]["fps"],
        height=record["height"], width=record["width"],
    )  # fmt: skip


def _read_source(pipe: FramePack, spec: VideoSpec, extend: Path) -> SourceVideo:
    """Read the end of a video file, or of a run folder with its latents."""
    height, width, latents = spec.height, spec.width, None
    if is_run(extend):
        run = RunDir.open(extend)
        height, width = _size_of(run, spec)
        # Latents of sections that are decoded alone do not follow each other in time.
        latents = None if pipe.sampling.decode_alone else run.latents()
    path = source_file(extend)
    logger.info("%s: reading its first frame and its end", path)
    source = read_source(pipe.geometry, path, fps_of(spec), height, width, latents)
    if latents is not None:
        before = 1 + (source.frames - 1) // pipe.geometry.time_compression
        missing = set(pipe.geometry.source_positions(before)) - set(latents)
        if missing or source.frames != run.record["frames"]:
            raise ValueError(
                f"run {run.folder} lacks latents {sorted(missing)} or has {source.frames} of"
                f" {run.record['frames']} frames; decode it again, or extend its video.mp4"
            )
    return source


def _size_of(run: RunDir, spec: VideoSpec) -> tuple[int, int]:
    """Return (height, width) of a run to extend. Raises ValueError if the run is unfinished, or if
    the spec asks for another size or frame rate."""
    record = run.record
    if record["status"] != "finished":
        raise ValueError(
            f"{run.folder} is {record['status']}; finish it first: framepack resume {run.folder}"
        )
    for name in ("height", "width", "fps"):
        there = record["flags"][name] if name == "fps" else record[name]
        if getattr(spec, name) not in (None, there):
            raise ValueError(
                f"{name} = {getattr(spec, name):g}, but run {run.folder} has {there:g}; omit"
                f" --{name}, or give its video.mp4 to --extend"
            )
    return record["height"], record["width"]


def warn_unused_settings(spec: VideoSpec, cfg_scale: float, recipe: Recipe) -> None:
    """Warn of given options that have no effect beside the others, the CFG scale and the recipe of
    the bundle."""
    default = VideoSpec()
    without_cfg = cfg_scale == 1
    timed = len(timed_prompts(spec.prompt)) > 1
    unused = {
        "--cfg-without has an effect only if --cfg-scale is not 1": without_cfg
        and spec.cfg_without != default.cfg_without,
        "--negative-prompt has no effect with --cfg-without history": not without_cfg
        and spec.cfg_without == "history"
        and bool(spec.negative_prompt),
        "--negative-prompt has an effect only if --cfg-scale is not 1": without_cfg
        and bool(spec.negative_prompt),
        f"--sampler has no effect: the bundle is sampled by {recipe.solver}": recipe.solver
        not in ("free", spec.sampler)
        and spec.sampler != default.sampler,
        "--cfg-rescale has an effect only if --cfg-scale is not 1": without_cfg
        and spec.cfg_rescale != default.cfg_rescale,
        "--prompt-blend has an effect only with timed prompts": not timed
        and spec.prompt_blend != default.prompt_blend,
        "--seconds is ignored if --sections is given": spec.sections is not None
        and spec.seconds != default.seconds,
        "--end-image-as has an effect only with --end-image": spec.end_image is None
        and spec.end_image_as != default.end_image_as,
    }
    for message in (message for message, is_unused in unused.items() if is_unused):
        warnings.warn(message, stacklevel=1)  # one line, so that many videos give one warning
