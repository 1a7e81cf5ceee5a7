"""Implement the commands sample, resume and decode, without their flags."""

import itertools
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from framepack_jax import bundle
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.jobs.loading import (
    check_bundle,
    check_devices,
    load_weights,
    open_pipe,
    read_loras,
)
from framepack_jax.jobs.provenance import check_loras
from framepack_jax.jobs.run_dir import Busy, RunDir
from framepack_jax.jobs.runner import decode_again, make_all, peak_memory
from framepack_jax.jobs.spec import (
    RANDOM_SEED,
    ComputeOptions,
    JobOptions,
    ModelOptions,
    VideoSpec,
)
from framepack_jax.jobs.task import Task
from framepack_jax.jobs.task_setup import TaskMaker, describe, saved_task
from framepack_jax.parallel.multihost import assert_same_on_hosts, on_all_hosts, on_primary

logger = logging.getLogger(__name__)
Video = tuple[epath.Path, VideoSpec | ValueError]


DEFAULT_JOB = JobOptions()


def sample(
    videos: Sequence[Video],
    model: ModelOptions,
    compute: ComputeOptions,
    job: JobOptions = DEFAULT_JOB,
    *,
    alone: bool = False,
) -> None:
    """Sample videos, each in its run folder.

    Args:
        videos: Run folders with the options of their videos, or with the errors of their lines in
            a jobs file.
        model: The bundle and its adapters.
        compute: Devices and memory.
        job: Batch size, and the treatment of earlier results.
        alone: True for a single video, whose error is raised. With several videos, a failure does
            not stop the others, and finished videos are skipped.

    Raises ValueError, OSError, and the errors in `errors.FAILURES`.
    """
    began = time.monotonic()
    if model.merge_lora and not model.lora:
        warnings.warn("--merge-lora has an effect only with --lora", stacklevel=1)
    path = bundle.resolve(model.bundle_name())
    pipe = on_all_hosts(
        open_pipe, path, model.dtype, model.schedule, compute.vae_tile, compute.mesh
    )
    check_bundle(path)
    check_devices(pipe, job.batch)
    assert_same_on_hosts("the jobs", repr(videos))
    tasks, failures = _tasks(TaskMaker(pipe, model, compute, job, alone), videos)
    if tasks:
        adapters = on_all_hosts(read_loras, pipe, model.lora)
        pipe = load_weights(pipe, path, compute, tasks, batch=job.batch)
        pipe = pipe.with_lora(adapters, merge=model.merge_lora) if adapters else pipe
        failures |= _run(pipe, tasks, job, began)
    if alone and failures:
        raise next(iter(failures.values()))
    _raise_failures(failures, len(videos))


def _tasks(
    maker: TaskMaker, videos: Sequence[Video]
) -> tuple[list[Task], dict[epath.Path, Exception]]:
    """Return the tasks of the videos that are not finished, and the errors of others."""
    tasks: list[Task] = []
    failures: dict[epath.Path, Exception] = {}
    for folder, spec in videos:
        try:
            if isinstance(spec, ValueError):
                raise spec
            task = maker.make(spec, folder)
        except (ValueError, OSError) as error:
            if maker.alone:
                raise
            failures[folder] = error
            logger.error("%s: error: %s", folder, error)
            continue
        if task is None:
            logger.info("%s: already finished", folder)
        else:
            logger.info("%s: %s", folder, describe(maker.pipe, task))
            tasks.append(task)
    return tasks, failures


def _raise_failures(failures: dict[epath.Path, Exception], count: int) -> None:
    """Raise one ValueError for all failures, except for videos that other processes sample."""
    if busy := [folder for folder, error in failures.items() if isinstance(error, Busy)]:
        logger.info("left to other processes, which sample them: %s", ", ".join(map(str, busy)))
    failures = {folder: error for folder, error in failures.items() if folder not in busy}
    if failures:
        raise ValueError(
            f"{len(failures)} of {count} videos failed: "
            + "; ".join(f"{folder.name}: {error}" for folder, error in failures.items())
        )


def resume(
    folder: epath.Path,
    compute: ComputeOptions,
    *,
    bundle_name: str | None = None,
    dtype: str | None = None,
    latents_only: bool = False,
) -> None:
    """Continue a run after its last finished section.

    `bundle_name` and `dtype` replace those of the run. Raises ValueError, OSError, and the errors
    in `errors.FAILURES`.
    """
    began = time.monotonic()
    if not _is_finished(RunDir.open(folder)):
        with RunDir.locked(folder) as run:
            if not _is_finished(run):
                pipe, task = saved_task(run, bundle_name, dtype, compute)
                return _finish(pipe, task, compute, JobOptions(latents_only=latents_only), began)
    logger.info("%s is already finished: %s", folder, folder / "video.mp4")
    return None


def _is_finished(run: RunDir) -> bool:
    return run.record["status"] == "finished" and on_primary((run.folder / "video.mp4").exists)


def _finish(
    pipe: FramePack, task: Task, compute: ComputeOptions, job: JobOptions, began: float
) -> None:
    """Sample and decode the missing sections of a locked run."""
    run = task.run
    run.record["dtype"] = pipe.dtype
    logger.info("%s: %s", run.folder, describe(pipe, task))
    on_all_hosts(check_loras, run)
    saved = run.record["flags"]
    adapters = on_all_hosts(read_loras, pipe, saved.get("lora", ()))
    pipe = load_weights(pipe, run.record["bundle"], compute, [task], keep_tiling=True)
    pipe = pipe.with_lora(adapters, merge=saved["merge_lora"]) if adapters else pipe
    if failures := _run(pipe, [task], job, began):
        raise failures[run.folder]


def decode(folder: epath.Path, compute: ComputeOptions, *, bundle_name: str | None = None) -> None:
    """Decode the saved latents of a run again, however many sections it has.

    Raises ValueError, OSError, and the errors in `errors.FAILURES`.
    """
    began = time.monotonic()
    with RunDir.locked(folder) as run:
        pipe, task = saved_task(run, bundle_name, None, compute, roles=("vae",))
        pipe = load_weights(pipe, run.record["bundle"], compute, [task], roles=("vae",))
        done = decode_again(pipe, task)
    logger.info(
        "%s: %d of %d sections decoded in %.1f s",
        folder / "video.mp4", done, len(task.layout.plan), time.monotonic() - began,
    )  # fmt: skip


def _run(
    pipe: FramePack, tasks: Sequence[Task], job: JobOptions, began: float
) -> dict[epath.Path, Exception]:
    """Sample the tasks; return the errors by folder."""
    load_seconds = round(time.monotonic() - began, 3)
    for task in tasks:
        task.run.record["timings"]["load_seconds"] = load_seconds
    failures = {}
    try:
        for task, error in make_all(pipe, tasks, job.batch, decode=not job.latents_only):
            folder = task.run.folder
            if error is None:
                logger.info(_result(task.run))
                continue
            failures[folder] = error
            if not isinstance(error, Busy):
                started = task.run.record["status"] != "beginning"
                kept = f"; finished sections are kept: framepack resume {folder}" if started else ""
                logger.error("%s: %s%s", folder, error, kept)
    except KeyboardInterrupt:
        for task in tasks:
            if task.run.record["status"] == "interrupted":
                logger.error(
                    "interrupted; finished sections are kept: framepack resume %s", task.run.folder
                )
        raise
    seconds, peak = time.monotonic() - began, peak_memory() / 2**30
    logger.info("%.1f s in all, peak memory %.2f GiB", seconds, peak)
    return failures


def _result(run: RunDir) -> str:
    """Return one line about the results of a finished run."""
    record, fps = run.record, run.record["flags"]["fps"]
    if record["status"] == "sampled":
        sections = f"{run.folder / 'latents'}: {record['sections']} sections"
        return f"{sections}; framepack decode {run.folder}"
    return (
        f"{run.folder / 'video.mp4'}: {record['frames']} frames, {record['frames'] / fps:.1f} s at"
        f" {fps:g} fps, {record['timings']['seconds_per_frame']:.3f} s a frame with compilation"
    )


def videos_of(
    prompts: Sequence[str], seeds: Sequence[int], base: Mapping[str, Any], output: epath.Path
) -> list[Video]:
    """Return a video for each pair of a prompt and a seed; several get a folder each in `output`.

    `base` has the other fields of their specs.
    """
    if not prompts or not seeds:
        raise ValueError('give at least one prompt (it may be "") and one seed')
    pairs = list(itertools.product(prompts, seeds))
    videos: list[Video] = []
    for i, (prompt, seed) in enumerate(pairs):
        name = f"{i:03d}_seed_{'drawn' if seed == RANDOM_SEED else seed}"
        folder = output if len(pairs) == 1 else output / name
        videos.append((folder, VideoSpec(**dict(base) | {"prompt": prompt, "seed": seed})))
    return videos
