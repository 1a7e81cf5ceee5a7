"""`framepack sample`: images and prompts become videos, each in a run folder."""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import math
import os
import secrets
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
from framepack_jax.cli.common import (
    ALONE,
    MultihostFlags,
    cli_errors,
    configure_jax,
    configure_jax_for_dry_run,
)
from framepack_jax.conversion.lora import read as read_lora
from framepack_jax.generation.offload_plan import TILES
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.generation.prompts import timed_prompts
from framepack_jax.generation.request import Request, end_image_use, make_layout
from framepack_jax.jobs.provenance import (
    absolute,
    check_loras,
    check_weights,
    differences,
    new_record,
    weights,
)
from framepack_jax.jobs.run_dir import RECORD, Busy, RunDir, check_folder, check_free, record_text
from framepack_jax.jobs.runner import FAILURES, Task, decode_again, explained, make_all, peak_memory
from framepack_jax.jobs.spec import (
    SHOT_FIELDS,
    VideoSpec,
    beginning_of,
    layout_of_spec,
    open_pipe,
    read,
    read_jobs,
    read_request,
    saved_layout,
    saved_spec,
    tiling_of,
    warn_unused_settings,
)
from framepack_jax.models import lora
from framepack_jax.ops.attention import Kernel
from framepack_jax.ops.attention import use as use_attention
from framepack_jax.parallel import hardware, sharding
from framepack_jax.parallel.multihost import (
    Terminated,
    assert_same_on_hosts,
    is_primary,
    on_all_hosts,
    on_primary,
)
from framepack_jax.planning.sampling import dry_run
from framepack_jax.utils.flags import parse

# The backends that attention kernels are made for; the others run on any.
KERNEL_PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}
# The seed that stands for one that is drawn.
DRAWN = -1
# Flags that may be others when a run is gone on with: where, and how, it is computed.
ON_THIS_MACHINE = ("bundle", "mesh", "offload", "attention", "vae_tile")
# Flags that a dry run would ignore.
NOT_COMPILED = (
    "resume", "decode", "jobs", "output", "overwrite", "latents_only", "extend", "end_image",
    "end_image_as", "key_frame", "lora", "merge_lora", "multihost",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sample(VideoSpec):
    """Make videos from images and prompts, or go on with a run.

    The output folder holds video.mp4, preview.png (the section being made; at the end a contact
    sheet), latents/ (a file a section, written before the section is decoded), segments/, inputs/
    and run.json (all that is needed to make it again). A run that was stopped goes on with
    --resume FOLDER.
    """

    bundle: str | None = None
    """Folder made by convert_weights.py; or a bundle of this package: tiny, for 128x128 pixels of
    the demo world, or random, which is not trained."""
    prompt: tuple[str, ...] = ("",)
    """What happens in the video. May be empty, and change with time: "0s: she waves 4s: she bows".
    Several prompts give several videos."""
    seed: tuple[int, ...] = (0,)
    """Seed of the noise, of up to 64 bits. The same seed and flags give the same video; -1 draws
    one. Several seeds give several videos of every prompt."""
    jobs: Path | None = None
    """A file with a video a line: JSON objects of flags without dashes, {"prompt": "...", "seed":
    3, "name": "waves"}, which replace those given here. Finished ones are skipped, unfinished ones
    resumed. Several processes may share it: each video is made by one of them."""
    batch: int = 1
    """Videos of equal size and length that are computed side by side."""
    output: Path | None = None
    """Folder for the results, with a folder a video where there are several; default: a new one
    under outputs/."""
    overwrite: bool = False
    """Replace the results of an earlier run in --output."""
    resume: Path | None = None
    """A run folder to go on with after its last finished section. Beside it there may be --dtype,
    --offload, --attention, --vae-tile, --latents-only, and --bundle where the bundle has moved."""
    decode: Path | None = None
    """A run folder whose saved latents are decoded again, and nothing else is done. Beside it there
    may be --offload, --vae-tile, --attention, and --bundle where the bundle has moved."""
    latents_only: bool = False
    """Save latents and decode nothing: do so later with --decode."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and computation; default: bfloat16 on GPU and TPU, float32 on a CPU."""
    schedule: str | None = None
    """Packing schedule, instead of the bundle's."""
    lora: tuple[str, ...] = ()
    """LoRA adapters for the transformer: FILE or FILE:WEIGHT, with the names of kohya and musubi,
    diffusers and PEFT, ComfyUI, OneTrainer, or the original model; or the folder of a training run.
    Several are added up."""
    merge_lora: bool = False
    """Add adapters into the weights: faster, and in bfloat16 less exact than beside them."""
    attention: Kernel = "auto"
    """Attention kernel: auto takes cuDNN's on GPU and splash on TPU where they serve; xla is slower
    and runs everywhere."""
    dry_run: str | None = None
    """Compile a step for this machine instead of sampling, and report whether it fits: v5e:4x4,
    v5p-64, h100:8, rtx4090:1. All weights are on the chips unless --offload full is given. Exit
    code 0 if it fits, else 1. The bundles framepack_i2v and framepack_f1 are the released models
    without weights, for this purpose."""
    dry_run_decode: bool = False
    """Compile the VAE's decoder too in a --dry-run: seconds for a GPU, minutes for a TPU."""
    mesh: str | None = None
    """How devices share weights and work: fsdp=4,context=2, their product being the number of
    devices. Axes are data (videos side by side), fsdp (weights), context (the tokens of a video)
    and tensor. Default: one device; for --dry-run and several processes, fsdp as far as it divides
    the attention heads, and context."""
    multihost: tyro.conf.OmitArgPrefixes[MultihostFlags] = ALONE
    """Run the same command on several hosts: the devices of all compute the videos, process 0
    writes them. Every host needs the weights, images and jobs."""
    offload: Literal["auto", "none", "full"] | None = None
    """Weights that leave the device. none: all networks stay. full: as few as possible stay; the
    transformer's blocks wait in host memory, and each is copied while the block before it computes;
    encoders stay on the disk, and the VAE decodes tiles of 256 pixels. auto, the default: as many
    stay as fit, and a line says which. Latents differ by rounding only."""
    vae_tile: int | None = None
    """Decode in square tiles of this many pixels, a multiple of 32 (256 is usual): less memory, for
    sizes above 480p and for cards below 80 GB."""


def main(args: list[str] | None = None, prog: str = "sample.py") -> None:
    """Parse flags and run; user errors end with one line and exit code 1."""
    flags = parse(Sample, args, prog)
    configure_jax()
    signal.signal(signal.SIGTERM, _terminate)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    failures = (ValueError, FloatingPointError, *FAILURES)
    with cli_errors(failures, explain=explained), use_attention(flags.attention):
        _join(flags)
        run(flags)


def _join(flags: Sample) -> None:
    """Join the other processes, if flags name them. Raises ValueError."""
    if not flags.multihost.join():
        return
    if jax.process_count() == 1:
        # Joining has taken the signal away.
        signal.signal(signal.SIGTERM, _terminate)
    else:
        # Ctrl-C, as SIGTERM, ends all of them after a step.
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert_same_on_hosts("flags", dataclasses.replace(flags, multihost=ALONE))
    if not is_primary():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _terminate(*_: object) -> None:
    raise Terminated


def run(flags: Sample) -> list[Path]:
    """Do what the flags say; returns the run folders. Raises ValueError, OSError by name."""
    if flags.batch < 1:
        raise ValueError(f"batch = {flags.batch}: expected at least 1")
    if flags.resume is not None and flags.decode is not None:
        raise ValueError("--resume and --decode exclude each other; --resume decodes as well")
    if flags.dry_run is not None:
        return _dry_run(flags)
    _check_kernel(flags.attention, jax.default_backend())
    if flags.resume is not None:
        return _go_on(flags.resume, flags)
    if flags.decode is not None:
        return _decode_again(flags.decode, flags)
    if flags.output is not None:
        return _make_new(flags)
    with _new_folder(flags) as output:
        return _make_new(dataclasses.replace(flags, output=output))


def _check_kernel(kernel: str, backend: str) -> None:
    needed = KERNEL_PLATFORMS.get(kernel, backend)
    if needed != backend:
        raise ValueError(
            f"attention kernel {kernel!r} runs on {needed}, this is a {backend}; take auto or xla"
        )


def _dry_run(flags: Sample) -> list[Path]:
    """Compile for another machine; leaves with exit code 1 where it does not fit."""
    _refuse(flags, "--dry-run compiles one section of new video", *NOT_COMPILED)
    configure_jax_for_dry_run()
    machine = hardware.parse(flags.dry_run)
    _check_kernel(flags.attention, "gpu" if machine.chip.platform == "cuda" else "tpu")
    mesh = sharding.parse_mesh(flags.mesh) if flags.mesh else None
    path = bundle.resolve(_bundle(flags))
    full = flags.offload == "full"
    tile = flags.vae_tile or (TILES.size if full else None)
    pipe = open_pipe(path, flags.dtype or "bfloat16", flags.schedule, tile)
    request = Request("", None if flags.image is None else video.load_image(flags.image))
    layout = make_layout(pipe.geometry, request, sections=1, height=flags.height, width=flags.width)
    report = dry_run(
        pipe, path, layout, flags.settings(), machine, mesh, flags.batch, flags.dry_run_decode,
        streamed=full,
    )  # fmt: skip
    print(f"{layout.height} x {layout.width} pixels, schedule {pipe.schedule}, {pipe.dtype}")
    print(report)
    if not report.fits:
        raise SystemExit(1)
    return []


def _bundle(flags: Sample) -> str:
    if flags.bundle is None:
        raise ValueError(
            '--bundle is missing: give a folder made by convert_weights.py, or "tiny"; to go on'
            " with a run, give --resume FOLDER"
        )
    return flags.bundle


def _make_new(flags: Sample) -> list[Path]:
    began = time.monotonic()
    if flags.merge_lora and not flags.lora:
        warnings.warn("--merge-lora counts only with --lora", stacklevel=1)
    path = bundle.resolve(_bundle(flags))
    pipe = on_all_hosts(open_pipe, path, flags.dtype, flags.schedule, flags.vae_tile, flags.mesh)
    _check_bundle(path, bundle.ROLES)
    _check_devices(pipe, flags.batch)
    wanted = list(_wanted(flags))
    assert_same_on_hosts("the jobs", repr(wanted))
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
        adapters = on_all_hosts(_read_loras, pipe, flags.lora)
        pipe = _with_weights(pipe, path, flags, tasks)
        pipe = pipe.with_lora(adapters, merge=flags.merge_lora) if adapters else pipe
        failures |= _make(pipe, tasks, flags, began)
    if alone and failures:
        raise next(iter(failures.values()))
    if busy := [folder for folder, error in failures.items() if isinstance(error, Busy)]:
        print(f"left to other processes, which are making them: {', '.join(map(str, busy))}")
    failures = {folder: error for folder, error in failures.items() if folder not in busy}
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(wanted)} videos were not made: "
            + "; ".join(f"{folder.name}: {error}" for folder, error in failures.items())
        )
    return [folder for folder, _ in wanted]


def _check_bundle(path: str | Path, roles: Sequence[str]) -> None:
    """Raise ValueError in all processes where one lacks these networks, or has others."""
    on_all_hosts(bundle.check_present, path, roles)
    assert_same_on_hosts(
        "the weights of the bundle", [weights(path)[role].get("sha256") for role in roles]
    )


def _with_weights(
    pipe: FramePack,
    path: str | Path,
    flags: Sample,
    tasks: Sequence[Task],
    roles: Sequence[str] = bundle.ROLES,
) -> FramePack:
    """Load what the flags keep on the device, and say what that is."""
    canvas = max((task.layout.canvas for task in tasks), key=math.prod)
    offload = flags.offload or tasks[0].run.record.get("offload", "auto")
    encoded = max(task.layout.encoded for task in tasks)
    plan = pipe.plan(path, offload, canvas, flags.batch, roles, encoded)
    # What a video began with it goes on with, unless told otherwise.
    began = tasks[0].run.record.get("decode_tile")
    if began and flags.resume and not (flags.offload or flags.vae_tile):
        plan = plan._replace(tiling=tiling_of(began))
    if plan.why:
        print(plan.why)
    for task in tasks:
        task.run.record |= {"offload": offload, "decode_tile": plan.tiling.size}
    return pipe.with_weights(path, roles, plan)


def _check_devices(pipe: FramePack, batch: int) -> None:
    """Raise ValueError where devices would do the same work; say so where some would do none."""
    if pipe.mesh is None and (count := jax.device_count()) > 1:
        print(f"of {count} devices one is used; --mesh divides weights and work over all of them")
    if pipe.mesh is not None and batch % pipe.mesh.shape["data"]:
        data = pipe.mesh.shape["data"]
        raise ValueError(
            f"batch = {batch} on a mesh with data={data}: devices would make the same video; give"
            f" --batch {data} and as many videos, or put them on fsdp and context"
        )


def _read_loras(pipe: FramePack, files: Sequence[str]) -> lora.LoRA:
    """The adapters of flags FILE:WEIGHT as one. Raises ValueError where one does not fit."""
    adapters = []
    for file, weight in map(lora.parse_weight, files):
        found = read_lora(Path(file), pipe.transformer.cfg)
        print(f"{file}: {found.summary()}, weight {weight:g}")
        if warning := found.warning():
            warnings.warn(f"{file}: {warning}", stacklevel=2)
        adapters.append((found.lora, weight))
    return lora.combine(adapters)


def _make(
    pipe: FramePack, tasks: Sequence[Task], flags: Sample, began: float
) -> dict[Path, Exception]:
    """Make videos, and say what became of them; returns {folder: error}."""
    load_seconds = round(time.monotonic() - began, 3)
    for task in tasks:
        task.run.record["timings"]["load_seconds"] = load_seconds
    failures = {}
    try:
        for task, error in make_all(pipe, tasks, flags.batch, decode=not flags.latents_only):
            folder = task.run.folder
            if error is None:
                _report(task.run)
                continue
            failures[folder] = error
            if isinstance(error, Busy):
                continue
            begun = task.run.record["status"] != "beginning"
            kept = f"; what is done stays: --resume {folder}" if begun else ""
            print(f"{folder}: {error}{kept}", file=sys.stderr)
    except KeyboardInterrupt:
        for task in tasks:
            if task.run.record["status"] == "interrupted":
                folder = task.run.folder
                print(f"interrupted; what is done stays: --resume {folder}", file=sys.stderr)
        raise
    print(f"{time.monotonic() - began:.1f} s in all, peak memory {peak_memory() / 2**30:.2f} GiB")
    return failures


def _report(run: RunDir) -> None:
    record = run.record
    if record["status"] == "sampled":
        print(f"{run.folder / 'latents'}: {record['sections']} sections; --decode {run.folder}")
        return
    print(
        f"{run.folder / 'video.mp4'}: {record['frames']} frames, "
        f"{record['frames'] / record['flags']['fps']:.1f} s at {record['flags']['fps']:g} fps,"
        f" {record['timings']['seconds_per_frame']:.3f} s a frame with compilation"
    )


def _go_on(folder: Path, flags: Sample) -> list[Path]:
    """Resume a run after its last finished section."""
    began = time.monotonic()
    _check_alone(flags, "--resume", "dtype", "latents_only", *ON_THIS_MACHINE)
    if not _is_finished(RunDir.open(folder)):
        with RunDir.locked(folder) as run:
            if not _is_finished(run):
                _finish(run, flags, began)
                return [folder]
    print(f"{folder} is finished already: {folder / 'video.mp4'}")
    return [folder]


def _is_finished(run: RunDir) -> bool:
    return run.record["status"] == "finished" and on_primary((run.folder / "video.mp4").exists)


def _finish(run: RunDir, flags: Sample, began: float) -> None:
    """Make what a locked run lacks."""
    folder = run.folder
    pipe, task = _saved(run, flags)
    run.record["dtype"] = pipe.dtype
    print(f"{folder}: {_describe(pipe, task)}")
    on_all_hosts(check_loras, run)
    saved = run.record["flags"]
    adapters = on_all_hosts(_read_loras, pipe, saved.get("lora", ()))
    pipe = _with_weights(pipe, run.record["bundle"], flags, [task])
    pipe = pipe.with_lora(adapters, merge=saved["merge_lora"]) if adapters else pipe
    if failures := _make(pipe, [task], flags, began):
        raise failures[folder]


def _decode_again(folder: Path, flags: Sample) -> list[Path]:
    """Decode the latents of a run folder, whatever sections it has."""
    began = time.monotonic()
    _check_alone(flags, "--decode", *ON_THIS_MACHINE)
    with RunDir.locked(folder) as run:
        pipe, task = _saved(run, flags, roles=("vae",))
        pipe = _with_weights(pipe, run.record["bundle"], flags, [task], roles=("vae",))
        done = decode_again(pipe, task)
    print(
        f"{folder / 'video.mp4'}: {done} of {len(task.layout.plan)} sections decoded in"
        f" {time.monotonic() - began:.1f} s"
    )
    return [folder]


def _check_alone(flags: Sample, what: str, *counting: str) -> None:
    """Raise ValueError for flags that would be ignored."""
    known = (what.removeprefix("--"), *counting, "multihost")
    idle = (field.name for field in dataclasses.fields(Sample) if field.name not in known)
    allowed = ", ".join(map(_flag, counting))
    _refuse(flags, f"{what} takes all flags from the run; beside it there may be {allowed}", *idle)


def _refuse(flags: Sample, why: str, *names: str) -> None:
    """Raise ValueError where any of these flags is given."""
    default = Sample()
    if given := [n for n in names if getattr(flags, n) != getattr(default, n)]:
        raise ValueError(f"{why}; leave out {', '.join(map(_flag, given))}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _saved(
    run: RunDir, flags: Sample, roles: Sequence[str] = bundle.ROLES
) -> tuple[FramePack, Task]:
    """Pipeline and task of a run folder, as its record says. Raises ValueError where it has nothing
    yet, and where the bundle, which may have moved, holds other weights for these roles now."""
    record = run.record
    if record["status"] == "beginning":
        raise ValueError(f"{run.folder} was stopped before it had anything; give its flags again")
    if flags.bundle is not None:
        record["bundle"] = absolute(bundle.resolve(flags.bundle))
    elif record["flags"]["bundle"] in bundle.BUILTIN_BUNDLES:
        record["bundle"] = absolute(bundle.resolve(record["flags"]["bundle"]))
    on_all_hosts(check_weights, run, roles)
    _check_bundle(record["bundle"], roles)
    pipe = on_all_hosts(
        open_pipe,
        record["bundle"],
        flags.dtype or record["dtype"],
        record["schedule"],
        flags.vae_tile or record["flags"]["vae_tile"],
        flags.mesh or record["flags"].get("mesh"),
    )
    return pipe, Task(run, saved_layout(pipe, run), saved_spec(run).settings())


def _wanted(flags: Sample) -> Iterator[tuple[Path, VideoSpec | ValueError]]:
    """(folder, flags) of every video, or what is wrong with its line of the jobs file."""
    output, base = flags.output, {name: getattr(flags, name) for name in SHOT_FIELDS}
    if flags.jobs is not None:
        if len(flags.prompt) > 1 or len(flags.seed) > 1:
            raise ValueError("--jobs with several prompts or seeds: put them into the file")
        base |= {"prompt": flags.prompt[0], "seed": flags.seed[0]}
        yield from on_all_hosts(list, read_jobs(flags.jobs, base, output))
        return
    if not flags.prompt or not flags.seed:
        raise ValueError('give at least one prompt (it may be "") and one seed')
    videos = list(itertools.product(flags.prompt, flags.seed))
    for i, (prompt, seed) in enumerate(videos):
        name = f"{i:03d}_seed_{'drawn' if seed == DRAWN else seed}"
        folder = output if len(videos) == 1 else output / name
        yield folder, VideoSpec(**base | {"prompt": prompt, "seed": seed})


@contextlib.contextmanager
def _new_folder(flags: Sample) -> Iterator[Path]:
    """A new folder under outputs/ for this process alone; taken away again if it stays empty."""
    folder = on_primary(_make_folder, flags)
    try:
        yield folder
    finally:
        if is_primary():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make_folder(flags: Sample) -> Path:
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    source = flags.jobs or flags.image or flags.extend
    # Image tools name files by their prompts: a name has 255 bytes at most.
    stem = os.fsencode(source.stem)[:100].decode(errors="ignore") if source else "text"
    name, outputs = f"{stamp}_{stem}", Path("outputs")
    try:
        outputs.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise OSError(
            f"{outputs} is no folder, or a link to one that is not there; give --output"
        ) from error
    for number in itertools.count(1):
        folder = outputs / f"{name if number == 1 else f'{name}_{number}'}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def _task(
    pipe: FramePack, flags: Sample, shot: VideoSpec, folder: Path, alone: bool
) -> Task | None:
    """What is to be made in a folder, checked as far as it can be without weights; None where it is
    finished already. Raises ValueError, OSError."""
    asked, shot = shot, on_primary(_with_seed, shot, folder, flags.overwrite)
    video.check_encoding(shot.fps, shot.crf)
    settings = shot.settings()
    warn_unused_settings(shot)
    record = on_primary(new_record, flags, shot, pipe, bundle.resolve(flags.bundle))
    # What another process has made since is not made again, not even with --overwrite.
    kept = dataclasses.replace(flags, overwrite=False)
    seen = record_text(folder)
    look = functools.partial(_task, pipe, kept, asked, folder, alone)
    if seen is not None and alone:
        check_free(folder)
    if seen is not None and not flags.overwrite:
        there = RunDir.open(folder)
        if there.record["status"] != "beginning":
            done = "sampled" if flags.latents_only else "finished"
            if _is_done(there, record, alone, done):
                return None
            on_all_hosts(check_weights, there)
            return Task(there, saved_layout(pipe, there), settings, seen=seen, look=look)
    if shot.extend is not None and shot.extend.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--output {folder} holds what --extend names; choose another --output")
    request = on_all_hosts(read_request, pipe, shot)
    layout = layout_of_spec(pipe, shot, request)
    if request.end_image is not None:
        record["flags"]["end_image_as"] = end_image_use(pipe.order, shot.end_image_as)
    check_folder(folder)
    record |= {
        "sections": len(layout.plan),
        "frames": pipe.geometry.frames_of(0, layout.length)[1],
        "height": layout.height,
        "width": layout.width,
        "canvas": list(layout.canvas),
        "key_frames": [seconds for seconds, _ in request.key_frames],
        "beginning": beginning_of(pipe, layout),
    }
    # Of many jobs the pictures would fill the memory: they are read again when it is their turn.
    later = functools.partial(read, pipe, shot, layout, request if alone else None)
    return Task(RunDir(folder, record), layout, settings, later, seen=seen, look=look)


def _with_seed(shot: VideoSpec, folder: Path, overwrite: bool) -> VideoSpec:
    """The flags with a seed in place of -1: that of the run in the folder, or a drawn one."""
    if shot.seed != DRAWN:
        return shot
    there = (folder / RECORD).exists() and not overwrite
    seed = RunDir.open(folder).record["flags"]["seed"] if there else secrets.randbits(32)
    return dataclasses.replace(shot, seed=seed)


def _is_done(run: RunDir, record: dict[str, Any], alone: bool, done: str) -> bool:
    """Whether a run that is there already needs nothing more. Raises ValueError where it is not the
    one that is asked for, or, for a video `alone`, in any case."""
    if differing := differences(run.record, record):
        raise ValueError(
            f"{run.folder} already holds a run of other flags ({differing}); choose another"
            " --output or --overwrite"
        )
    status = run.record["status"]
    if alone:
        advice = "--overwrite makes it again"
        if status != "finished":
            advice = f"go on with --resume {run.folder}, or {advice}"
        raise ValueError(f"{run.folder} already holds a run of these flags, {status}; {advice}")
    return status in ("finished", done)


def _describe(pipe: FramePack, task: Task) -> str:
    """What is really made, in a line, and its prompts by time, a line each."""
    layout, record = task.layout, task.run.record
    sampled = ""
    if layout.canvas != (layout.height, layout.width):
        sampled = f" (the middle of {layout.canvas[0]} x {layout.canvas[1]})"
    text = (
        f"{len(layout.plan)} sections, {record['frames']} frames of {layout.height} x"
        f" {layout.width} pixels{sampled}, schedule {pipe.schedule}, {pipe.dtype} on"
        f" {record['device']}, seed {record['flags']['seed']}"
    )
    if layout.before > 1:
        given = pipe.geometry.frames_of(0, layout.before)[1]
        text += f"; the first {given} frames are those of {record['flags']['extend']}"
    prompt = record["flags"]["prompt"]
    prompts = timed_prompts(prompt)
    if prompts != [(0.0, prompt)]:
        text += "".join(f"\n  from {seconds:g} s: {part}" for seconds, part in prompts)
    return text
