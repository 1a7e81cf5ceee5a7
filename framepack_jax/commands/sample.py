"""`framepack sample`: images and prompts become videos, each in a run folder."""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import platform
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from framepack_jax import bundle, video
from framepack_jax.commands.making import Task, decode_again, make_all, peak_memory
from framepack_jax.commands.runs import FORMAT, RECORD, Run
from framepack_jax.commands.shots import (
    SHOT_FIELDS,
    Shot,
    beginning_of,
    lay_out_shot,
    read,
    read_jobs,
    read_request,
)
from framepack_jax.models.vae import Tiling
from framepack_jax.pipeline import FramePack, Settings
from framepack_jax.request import Layout, Request, lay_out

EMBEDDED = {"tiny": Path(__file__).parent.parent / "assets" / "tiny"}
PACKAGES = ("framepack-jax", "jax", "jaxlib", "flax", "transformers", "av", "numpy")
# Exit codes of programs that a signal ended.
INTERRUPTED, TERMINATED = 130, 143


@dataclasses.dataclass(frozen=True)
class Sample(Shot):
    """Make videos from images and prompts, or go on with a run.

    The output folder holds video.mp4, preview.png (the section being made; at the end a contact
    sheet), latents/ (a file a section, written before the section is decoded), segments/, inputs/
    and run.json (all that is needed to make it again). A run that was stopped goes on with
    --resume FOLDER.
    """

    bundle: str | None = None
    """Folder made by convert_weights.py, or "tiny", the small untrained bundle in this package."""
    prompt: tuple[str, ...] = ("",)
    """What happens in the video. May be empty, and change with time: "0s: she waves 4s: she bows".
    Several prompts give several videos."""
    seed: tuple[int, ...] = (0,)
    """Seed of the noise. The same seed and flags give the same video. Several seeds give several
    videos of every prompt."""
    jobs: Path | None = None
    """A file with a video a line: JSON objects of flags without dashes, {"prompt": "...", "seed":
    3, "name": "waves"}, which replace those given here. Finished ones are skipped, unfinished ones
    resumed."""
    batch: int = 1
    """Videos of equal size and length that are computed side by side."""
    output: Path | None = None
    """Folder for the results, with a folder a video where there are several; default: a new one
    under outputs/."""
    overwrite: bool = False
    """Replace the results of an earlier run in --output."""
    resume: Path | None = None
    """A run folder to go on with after its last finished section. Of the other flags only --dtype
    and --vae-tile count."""
    decode: Path | None = None
    """A run folder whose saved latents are decoded again, and nothing else is done. Of the other
    flags only --vae-tile counts."""
    latents_only: bool = False
    """Save latents and decode nothing: do so later with --decode."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and computation; default: bfloat16 on GPU and TPU, float32 on a CPU."""
    schedule: str | None = None
    """Packing schedule, instead of the bundle's."""
    vae_tile: int | None = None
    """Decode in square tiles of this many pixels, a multiple of 32 (256 is usual): less memory, for
    sizes above 480p and for cards below 80 GB."""


def main(args: list[str] | None = None, prog: str = "sample.py") -> None:
    """Parse flags and run; user errors end with one line and exit code 1."""
    flags = tyro.cli(Sample, prog=prog, args=args)
    signal.signal(signal.SIGTERM, _terminate)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        run(flags)
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as interrupt:
        raise SystemExit(TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED) from None


class Terminated(KeyboardInterrupt):
    """SIGTERM: leave as after Ctrl-C."""


def _terminate(*_: object) -> None:
    raise Terminated


def run(flags: Sample) -> list[Path]:
    """Do what the flags say; returns the run folders. Raises ValueError, OSError by name."""
    if flags.batch < 1:
        raise ValueError(f"batch = {flags.batch}: expected at least 1")
    if flags.resume is not None and flags.decode is not None:
        raise ValueError("--resume and --decode exclude each other; --resume decodes as well")
    if flags.resume is not None:
        return _go_on(flags.resume, flags)
    if flags.decode is not None:
        return _decode_again(flags.decode, flags)
    return _make_new(flags)


def _make_new(flags: Sample) -> list[Path]:
    began = time.monotonic()
    if flags.bundle is None:
        raise ValueError(
            '--bundle is missing: give a folder made by convert_weights.py, or "tiny"; to go on'
            " with a run, give --resume FOLDER"
        )
    pipe = _open(flags.bundle, flags.dtype, flags.schedule, flags.vae_tile)
    wanted = list(_wanted(flags))
    alone = flags.jobs is None and len(wanted) == 1
    tasks, failures = [], {}
    for folder, shot in wanted:
        try:
            if isinstance(shot, ValueError):
                raise shot
            task = _task(pipe, flags, shot, folder, alone)
            print(f"{folder}: " + ("finished already" if task is None else _describe(pipe, task)))
            tasks += [task] if task else []
        except (ValueError, OSError) as error:
            if alone:
                raise
            failures[folder] = error
            print(f"{folder}: error: {error}", file=sys.stderr)
    if tasks:
        pipe = pipe.with_weights(_path_of(flags.bundle))
        failures |= _make(pipe, tasks, flags, began)
    if alone and failures:
        raise next(iter(failures.values()))
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(wanted)} videos were not made: "
            + "; ".join(f"{folder.name}: {error}" for folder, error in failures.items())
        )
    return [folder for folder, _ in wanted]


def _make(
    pipe: FramePack, tasks: Sequence[Task], flags: Sample, began: float
) -> dict[Path, Exception]:
    """Make videos, and say what became of them; returns {folder: error}."""
    load_seconds = round(time.monotonic() - began, 3)
    for task in tasks:
        task.run.record["timings"]["load_seconds"] = load_seconds
    folders = [task.run.folder for task in tasks]
    try:
        failures = make_all(pipe, tasks, flags.batch, decode=not flags.latents_only)
    except KeyboardInterrupt:
        begun = [folder for folder in folders if (folder / RECORD).exists()]
        for folder in begun:
            if Run.open(folder).record["status"] == "interrupted":
                print(f"interrupted; what is done stays: --resume {folder}", file=sys.stderr)
        raise
    for folder in folders:
        if folder in failures:
            if (folder / RECORD).exists():
                print(f"{folder}: stopped; what is done stays: --resume {folder}", file=sys.stderr)
            continue
        _report(Run.open(folder))
    print(f"{time.monotonic() - began:.1f} s in all, peak memory {peak_memory() / 2**30:.2f} GiB")
    return failures


def _report(run: Run) -> None:
    record = run.record
    if record["status"] == "sampled":
        print(f"{run.folder / 'latents'}: {record['sections']} sections; --decode {run.folder}")
        return
    print(
        f"{run.folder / 'video.mp4'}: {record['frames']} frames, "
        f"{record['frames'] / record['flags']['fps']:.1f} s at {record['flags']['fps']} fps,"
        f" {record['timings']['seconds_per_frame']:.3f} s a frame with compilation"
    )


def _go_on(folder: Path, flags: Sample) -> list[Path]:
    """Resume a run after its last finished section."""
    began = time.monotonic()
    run = Run.open(folder)
    if run.record["status"] == "finished":
        print(f"{folder} is finished already: {folder / 'video.mp4'}")
        return [folder]
    _check_weights(run)
    dtype = flags.dtype or run.record["dtype"]
    pipe, task = _saved(run, dtype, flags.vae_tile)
    run.record["dtype"] = dtype
    print(f"{folder}: {_describe(pipe, task)}")
    pipe = pipe.with_weights(run.record["bundle"])
    if failures := _make(pipe, [task], flags, began):
        raise failures[folder]
    return [folder]


def _decode_again(folder: Path, flags: Sample) -> list[Path]:
    """Decode the latents of a run folder, whatever sections it has."""
    began = time.monotonic()
    run = Run.open(folder)
    pipe, task = _saved(run, run.record["dtype"], flags.vae_tile)
    pipe = pipe.with_weights(run.record["bundle"], roles=("vae",))
    done = decode_again(pipe, task)
    print(
        f"{folder / 'video.mp4'}: {done} of {len(task.layout.plan)} sections decoded in"
        f" {time.monotonic() - began:.1f} s"
    )
    return [folder]


def _saved(run: Run, dtype: str, tile: int | None) -> tuple[FramePack, Task]:
    """Pipeline and task of a run folder, as its record says."""
    record = run.record
    values = {k: v for k, v in record["flags"].items() if k in SHOT_FIELDS}
    shot = Shot(**values | {"key_frame": tuple(values["key_frame"])})
    tile = tile or record["flags"]["vae_tile"]
    pipe = _open(record["bundle"], dtype, record["schedule"], tile)
    layout = lay_out(
        pipe.geometry, run.request(), sections=record["sections"], fps=shot.fps,
        height=record["height"], width=record["width"],
    )  # fmt: skip
    return pipe, Task(run, layout, shot.settings())


def _wanted(flags: Sample) -> Iterator[tuple[Path, Shot | ValueError]]:
    """(folder, flags) of every video, or what is wrong with its line of the jobs file."""
    output = flags.output or Path("outputs") / _name(flags)
    base = {name: getattr(flags, name) for name in SHOT_FIELDS}
    if flags.jobs is not None:
        if len(flags.prompt) > 1 or len(flags.seed) > 1:
            raise ValueError("--jobs with several prompts or seeds: put them into the file")
        base |= {"prompt": flags.prompt[0], "seed": flags.seed[0]}
        yield from read_jobs(flags.jobs, base, output)
        return
    if not flags.prompt or not flags.seed:
        raise ValueError('give at least one prompt (it may be "") and one seed')
    videos = list(itertools.product(flags.prompt, flags.seed))
    for i, (prompt, seed) in enumerate(videos):
        folder = output if len(videos) == 1 else output / f"{i:03d}_seed_{seed}"
        yield folder, Shot(**base | {"prompt": prompt, "seed": seed})


def _name(flags: Sample) -> str:
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    source = flags.jobs or flags.image or flags.extend
    return f"{stamp}_{source.stem if source else 'text'}"


def _task(pipe: FramePack, flags: Sample, shot: Shot, folder: Path, alone: bool) -> Task | None:
    """What is to be made in a folder, checked as far as it can be without weights; None where it is
    finished already. Raises ValueError, OSError."""
    video.check_encoding(shot.fps, shot.crf)
    settings = shot.settings()
    request = read_request(pipe, shot)
    layout = lay_out_shot(pipe, shot, request)
    record = _record(pipe, flags, shot, request, layout)
    if (folder / RECORD).exists() and not flags.overwrite:
        return _task_there(Run.open(folder), record, layout, settings, alone)
    _check_writable(folder)
    # Of many jobs the pictures would fill the memory: they are read again when it is their turn.
    later = functools.partial(read, pipe, shot, layout, request if alone else None)
    return Task(Run(folder, record), layout, settings, later)


def _task_there(
    run: Run, record: dict, layout: Layout, settings: Settings, alone: bool
) -> Task | None:
    """Go on with a run that is in the folder already, if it is the same one."""
    old, new = run.record["flags"], record["flags"]
    if differing := sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k)):
        shown = ", ".join(f"{k} = {old.get(k)!r} there, {new.get(k)!r} here" for k in differing[:3])
        raise ValueError(
            f"{run.folder} already holds a run of other flags ({shown}); choose another --output or"
            " --overwrite"
        )
    finished = run.record["status"] == "finished"
    if alone:
        advice = "--overwrite makes it again" if finished else f"go on with --resume {run.folder}"
        raise ValueError(
            f"{run.folder} already holds a run of these flags, {run.record['status']}; {advice}"
        )
    if finished:
        return None
    _check_weights(run)
    return Task(run, layout, settings)


def _check_writable(folder: Path) -> None:
    """Raise OSError before anything is computed for a folder that cannot take it."""
    probe = folder / "run.json.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(f"output folder {folder} cannot be written ({error.strerror})") from error


def _record(
    pipe: FramePack, flags: Sample, shot: Shot, request: Request, layout: Layout
) -> dict[str, Any]:
    """What `run.json` holds when a run begins."""
    process = {name: getattr(flags, name) for name in ("bundle", "dtype", "schedule", "vae_tile")}
    values = dataclasses.asdict(shot) | process
    images = {"image": shot.image, "end_image": shot.end_image}
    path = _path_of(flags.bundle)
    return {
        "format": FORMAT,
        "status": "begun",
        "flags": {k: _plain(v) for k, v in values.items()},
        "image_sha256": {k: _sha256(v) for k, v in images.items() if v is not None},
        "bundle": str(path if "://" in str(path) else Path(path).absolute()),
        "weights": _weights(path),
        "schedule": pipe.schedule,
        "order": pipe.order,
        "dtype": pipe.dtype,
        "sections": len(layout.plan),
        "frames": pipe.geometry.frames_of(0, layout.length)[1],
        "height": layout.height,
        "width": layout.width,
        "canvas": list(layout.canvas),
        "key_frames": [
            [s, p] for (s, _), p in zip(request.key_frames, layout.stills, strict=False)
        ],
        "beginning": beginning_of(pipe, layout),
        "spans": [],
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "timings": {},
    }


def _plain(value: Any) -> Any:
    """A flag as JSON has it."""
    return (
        list(value)
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
    )


def _describe(pipe: FramePack, task: Task) -> str:
    """What is really made, in a line."""
    layout, record = task.layout, task.run.record
    sampled = (
        ""
        if layout.canvas == (layout.height, layout.width)
        else (f" (the middle of {layout.canvas[0]} x {layout.canvas[1]})")
    )
    text = (
        f"{len(layout.plan)} sections, {record['frames']} frames of {layout.height} x"
        f" {layout.width} pixels{sampled}, schedule {pipe.schedule}, {pipe.dtype} on"
        f" {record['device']}"
    )
    if layout.before > 1:
        given = pipe.geometry.frames_of(0, layout.before)[1]
        text += f"; the first {given} frames are those of {record['flags']['extend']}"
    return text


def _open(path: str, dtype: str | None, schedule: str | None, tile: int | None) -> FramePack:
    tiling = Tiling() if tile is None else Tiling(size=tile, stride=tile * 3 // 4)
    return FramePack.open(_path_of(path), dtype=dtype, schedule=schedule, tiling=tiling)


def _path_of(name: str) -> str | Path:
    return EMBEDDED.get(name, name)


def _weights(path: str | Path) -> dict[str, Any]:
    return {k: role.source for k, role in bundle.read_manifest(path).roles.items()}


def _check_weights(run: Run) -> None:
    """Raise ValueError where a run was begun with other weights than its bundle has now."""
    now = _weights(run.record["bundle"])
    for role, source in run.record["weights"].items():
        if now.get(role, {}).get("sha256") != source.get("sha256"):
            raise ValueError(
                f"run {run.folder} was begun with another {role} than bundle"
                f" {run.record['bundle']} holds now; make it again with --overwrite"
            )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
