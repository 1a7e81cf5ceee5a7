"""The flags of one video, from the command line or a line of a jobs file, and what they name."""

import dataclasses
import itertools
import json
import math
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from framepack_jax import bundle, video
from framepack_jax.diffusion import cache
from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.generation.prompts import timed_prompts
from framepack_jax.generation.request import Layout, Request, SourceVideo, make_layout, read_source
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.models.hunyuan.vae import Tiling
from framepack_jax.parallel import sharding
from framepack_jax.parallel.multihost import is_primary
from framepack_jax.utils.flags import check_text, tidied
from framepack_jax.utils.progress import Bar


@dataclasses.dataclass(frozen=True)
class VideoSpec:
    """The flags of one video."""

    image: Path | None = None
    """First frame: any image file, scaled and cropped to the size of the video. Without it the
    video begins from black, led by the prompt alone."""
    prompt: str = ""
    """What happens in the video. May be empty."""
    negative_prompt: str = ""
    """What should not happen; counts only with --cfg-scale other than 1."""
    end_image: Path | None = None
    """Image that the video ends with."""
    end_image_as: Literal["auto", "guide", "still"] = "auto"
    """guide: the section made first reads it as the frame that follows, and it is not a part of the
    video, as in the released demo's variant with an end frame and in diffusers; inverted schedules
    only. still: the last four frames. auto: guide with an inverted schedule, else still."""
    key_frame: tuple[str, ...] = ()
    """Images at times: 3.5s=photo.png 7s=other.png."""
    extend: Path | None = None
    """A video file or a run folder to go on from, instead of --image."""
    prompt_blend: float = 1.0
    """Seconds over which prompts with times are blended into each other."""
    seconds: float = 5.0
    """Length of what is made; the number of sections that comes nearest."""
    sections: int | None = None
    """Length in sections, instead of --seconds."""
    seed: int = 0
    """Seed of the noise, of up to 64 bits. The same seed and flags give the same video; -1 draws
    one."""
    steps: int = 25
    """Denoising steps a section."""
    sampler: Literal["unipc", "unipc-bh2", "euler"] = "unipc"
    """Solver of the sampling ODE."""
    distilled_guidance: float = 10.0
    """Scale for the guidance-distilled network (costs nothing)."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale; other than 1 it doubles the time."""
    cfg_rescale: float = 0.0
    """How far --cfg-scale's gain in contrast is taken back, 0 to 1."""
    step_cache: Literal["none", "tea", "first-block"] = "none"
    """Leave the network's blocks out at steps where little changes: faster, less exact."""
    cache_threshold: float | None = None
    """Change at which --step-cache lets the blocks run; default: 0.15 (tea), 0.05 (first-block)."""
    height: int | None = None
    """Height in pixels, any even number; default: of the bundle's sizes the nearest in shape to the
    image."""
    width: int | None = None
    """Width in pixels; give both or neither."""
    fps: float = 30.0
    """Frames a second of the video, also 23.976 or 29.97; the models are made for 30."""
    crf: int = 16
    """H.264 quality, 1 (largest file) to 51."""
    gif: bool = False
    """Also write video.gif at the end."""

    def settings(self) -> Settings:
        """Raises ValueError for what cannot be."""
        if not 0 <= self.prompt_blend < math.inf:
            raise ValueError(f"prompt_blend = {self.prompt_blend}: expected seconds, 0 or more")
        step_cache = None
        if self.step_cache != "none":
            step_cache = cache.StepCacheConfig(self.step_cache, self.cache_threshold)
        elif self.cache_threshold is not None:
            raise ValueError(
                f"cache_threshold = {self.cache_threshold} needs --step-cache tea or first-block"
            )
        return Settings(
            self.steps,
            self.sampler,
            self.distilled_guidance,
            self.cfg_scale,
            self.cfg_rescale,
            step_cache,
        )


def warn_unused_settings(shot: VideoSpec) -> None:
    """Warn of flags that change nothing beside the others."""
    default = VideoSpec()
    without_cfg = shot.cfg_scale == default.cfg_scale
    timed = len(timed_prompts(shot.prompt)) > 1
    idle = {
        "--negative-prompt counts only with --cfg-scale other than 1": without_cfg
        and bool(shot.negative_prompt),
        "--cfg-rescale counts only with --cfg-scale other than 1": without_cfg
        and shot.cfg_rescale != default.cfg_rescale,
        "--prompt-blend counts only with prompts by time": not timed
        and shot.prompt_blend != default.prompt_blend,
        "--seconds does not count beside --sections": shot.sections is not None
        and shot.seconds != default.seconds,
        "--end-image-as counts only with --end-image": shot.end_image is None
        and shot.end_image_as != default.end_image_as,
    }
    for message in (message for message, is_idle in idle.items() if is_idle):
        warnings.warn(message, stacklevel=1)  # one place, so that it is said once for many videos


SHOT_FIELDS = {field.name: field for field in dataclasses.fields(VideoSpec)}


def read_jobs(
    path: Path, base: dict[str, Any], output: Path
) -> Iterator[tuple[Path, VideoSpec | ValueError]]:
    """Jobs by the lines of a file. A bad line is handed on as an error, so that others are made."""
    try:
        # Not splitlines, which also splits at marks that JSON allows inside a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"jobs {path}: expected lines of JSON in UTF-8 ({error})") from error
    if not any(map(str.strip, lines)):
        raise ValueError(f"jobs {path}: it is empty; give a JSON object a line")
    seen = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        folder = output / f"job_{number:04d}"
        try:
            job = json.loads(line, object_pairs_hook=_once)
            if not isinstance(job, dict):
                raise ValueError("expected a JSON object")
            name = job.pop("name", folder.name)
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"name {name!r}: expected the name of a folder")
            check_text("name", name)
            folder = output / name
            if name in seen:
                raise ValueError(f"name {name!r} is that of an earlier line")
            seen.add(name)
            yield folder, VideoSpec(**base | {k: _typed(k, v) for k, v in job.items()})
        except (ValueError, OverflowError, RecursionError) as error:
            yield folder, ValueError(f"{path}, line {number}: {error}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are given once. Raises ValueError."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is given twice")
    return dict(pairs)


def _typed(name: str, value: Any) -> Any:
    """A value of a jobs file as the flag wants it. Raises ValueError."""
    if name not in SHOT_FIELDS:
        raise ValueError(f"{name!r} is no flag of a video; known are {', '.join(SHOT_FIELDS)}")
    given, kind = value, SHOT_FIELDS[name].type
    value = tidied(name, tuple(value) if isinstance(value, list) else value)
    if kind == tuple[str, ...]:
        if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
            return value
        raise ValueError(f"{name} = {given!r}: expected a list of texts")
    choices = typing.get_args(kind) or (kind,)
    if value in choices or (value is None and type(None) in choices):
        return value
    if isinstance(value, str) and Path in choices:
        return Path(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in choices:
        return float(value)
    types = tuple(c for c in choices if isinstance(c, type))
    if types and isinstance(value, types) and not isinstance(value, bool):
        return value
    names = [c.__name__ if isinstance(c, type) else repr(c) for c in choices]
    raise ValueError(f"{name} = {given!r}: expected {' or '.join(names)}")


def read(
    pipe: FramePack, shot: VideoSpec, layout: Layout, request: Request | None
) -> tuple[Request, Iterator[np.ndarray] | None]:
    """The request, and the frames of a video that is extended which no section changes."""
    request = request or read_request(pipe, shot)
    count = beginning_of(pipe, layout)
    if not count:
        return request, None
    return request, _kept_frames(shot, count, (layout.height, layout.width))


def _kept_frames(shot: VideoSpec, count: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The first frames of a video that is extended, scaled, with a progress bar."""
    frames = itertools.islice(video.read_frames(source_file(shot), shot.fps), count)
    for frame in Bar(frames, "copying", count, leave=False, unit="frame", disable=not is_primary()):
        yield video.resize_center_crop(frame, *size)


def beginning_of(pipe: FramePack, layout: Layout) -> int:
    """How many frames of a video that is extended stay as they are."""
    return pipe.geometry.frames_of(layout.overlap_start, layout.before)[0]


def layout_of_spec(pipe: FramePack, shot: VideoSpec, request: Request) -> Layout:
    """Raises ValueError where flags and what they name do not go together."""
    height, width = shot.height, shot.width
    if request.footage is not None:
        height, width = request.footage.first.shape[:2]
    return make_layout(
        pipe.geometry, request, seconds=shot.seconds, sections=shot.sections, fps=shot.fps,
        height=height, width=width,
    )  # fmt: skip


def tiling_of(tile: int | None) -> Tiling:
    """Squares of so many pixels that overlap by a quarter; whole frames without."""
    return Tiling() if tile is None else Tiling(size=tile, stride=tile * 3 // 4)


def open_pipe(
    path: str | Path,
    dtype: str | None,
    schedule: str | None,
    tile: int | None,
    mesh: str | None = None,
) -> FramePack:
    """`FramePack.open` with flags for tiles and mesh; several processes have a mesh in any case."""
    tiling = tiling_of(tile)
    sizes = {} if mesh is None else sharding.parse_mesh(mesh)
    if mesh is None and jax.process_count() > 1:
        _, cfg = bundle.role_config(bundle.read_manifest(path), "transformer")
        sizes = sharding.default_sizes(jax.device_count(), cfg.heads)
    devices = sharding.make_mesh(**sizes) if sizes else None
    return FramePack.open(path, dtype=dtype, schedule=schedule, tiling=tiling, mesh=devices)


def saved_spec(run: RunDir) -> VideoSpec:
    """The flags that a run was begun with."""
    flags = {k: v for k, v in run.record["flags"].items() if k in SHOT_FIELDS}
    return VideoSpec(**flags | {"key_frame": tuple(flags["key_frame"])})


def saved_layout(pipe: FramePack, run: RunDir) -> Layout:
    """The layout of a run that was begun."""
    record = run.record
    return make_layout(
        pipe.geometry, run.request(), sections=record["sections"], fps=record["flags"]["fps"],
        height=record["height"], width=record["width"],
    )  # fmt: skip


def read_request(pipe: FramePack, shot: VideoSpec) -> Request:
    """Read the images and the video that flags name."""
    if shot.image is not None and shot.extend is not None:
        raise ValueError("--image and --extend exclude each other: a video begins with one of them")
    if shot.image is None and shot.extend is None and not shot.prompt.strip():
        raise ValueError("nothing to make a video from: give --image, --extend or a --prompt")
    keys = []
    for text in shot.key_frame:
        seconds, equals, path = text.partition("=")
        try:
            seconds = float(seconds.strip().removesuffix("s"))
        except ValueError:
            equals = ""
        if not equals or not path:
            raise ValueError(f"key frame {text!r}: expected a time and an image, 3.5s=photo.png")
        keys.append((seconds, video.load_image(path)))
    return Request(
        prompt=shot.prompt,
        image=None if shot.image is None else video.load_image(shot.image),
        negative_prompt=shot.negative_prompt,
        seed=shot.seed,
        end_image=None if shot.end_image is None else video.load_image(shot.end_image),
        end_image_as=shot.end_image_as,
        key_frames=tuple(sorted(keys, key=lambda key: key[0])),
        footage=None if shot.extend is None else _read_source(pipe, shot),
    )


def source_file(shot: VideoSpec) -> Path:
    """Return the video file to extend."""
    return shot.extend / "video.mp4" if shot.extend.is_dir() else shot.extend


def _read_source(pipe: FramePack, shot: VideoSpec) -> SourceVideo:
    """The end of a video file, or of a run folder with its latents."""
    height, width, latents = shot.height, shot.width, None
    if shot.extend.is_dir():
        run = RunDir.open(shot.extend)
        height, width = _size_of(run, shot)
        latents = run.latents()
    path = source_file(shot)
    print(f"{path}: reading its first frame and its end")
    footage = read_source(pipe.geometry, path, shot.fps, height, width, latents)
    if latents is not None:
        before = 1 + (footage.frames - 1) // pipe.geometry.time_compression
        missing = set(pipe.geometry.footage_positions(before)) - set(latents)
        if missing or footage.frames != run.record["frames"]:
            raise ValueError(
                f"run {run.folder} lacks latents {sorted(missing)} or has {footage.frames} of"
                f" {run.record['frames']} frames; decode it again, or extend its video.mp4"
            )
    return footage


def _size_of(run: RunDir, shot: VideoSpec) -> tuple[int, int]:
    """(height, width) of a run to be extended. Raises ValueError where it cannot be, or not with
    these flags."""
    record = run.record
    if record["status"] != "finished":
        raise ValueError(f"{run.folder} is {record['status']}; finish it with --resume first")
    for name in ("height", "width", "fps"):
        there = record["flags"][name] if name == "fps" else record[name]
        if getattr(shot, name) not in (None, there):
            raise ValueError(
                f"{name} = {getattr(shot, name):g}, but run {run.folder} has {there:g}; leave"
                f" --{name} as it is there, or give its video.mp4 to --extend"
            )
    return record["height"], record["width"]
