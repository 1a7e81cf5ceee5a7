"""Turn the options of a video into a task: a new run folder, or an unfinished run to continue."""

import dataclasses
import functools
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from framepack_jax import bundle, video
from framepack_jax.generation.layout import Layout, end_image_use
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.generation.prompts import timed_prompts
from framepack_jax.jobs.inputs import (
    fps_of,
    layout_of_spec,
    read_inputs,
    read_request,
    saved_layout,
    saved_spec,
    warn_unused_settings,
)
from framepack_jax.jobs.loading import check_bundle, open_pipe
from framepack_jax.jobs.provenance import absolute, check_weights, differences, new_record
from framepack_jax.jobs.record import RECORD, record_text
from framepack_jax.jobs.run_dir import RunDir, check_folder, check_free
from framepack_jax.jobs.run_files import would_replace
from framepack_jax.jobs.spec import (
    RANDOM_SEED,
    ComputeOptions,
    JobOptions,
    ModelOptions,
    VideoSpec,
)
from framepack_jax.jobs.task import Inputs, Task
from framepack_jax.parallel.multihost import on_all_hosts, on_primary


@dataclasses.dataclass(frozen=True)
class TaskMaker:
    """Makes the tasks of one command. `alone` if it samples one video."""

    pipe: FramePack
    model: ModelOptions
    compute: ComputeOptions
    job: JobOptions
    alone: bool

    def make(self, spec: VideoSpec, folder: epath.Path) -> Task | None:
        """Check a video without loading weights; return None if it is already finished.

        Raises ValueError, OSError.
        """
        requested, spec = spec, on_primary(_with_seed, spec, folder, self.job.overwrite)
        spec = spec.filled(self.pipe.sampling)
        video.check_encoding(fps_of(spec), spec.crf)
        settings = spec.settings()
        warn_unused_settings(requested, settings.cfg_scale, self.pipe.sampling.recipe)
        settings.check(self.pipe.transformer.spec, self.pipe.sampling, self.pipe.schedule)
        record = on_primary(new_record, spec, self.model, self.compute, self.pipe)
        # A video that another process finishes meanwhile is kept, even with --overwrite.
        kept = dataclasses.replace(self, job=dataclasses.replace(self.job, overwrite=False))
        refresh = functools.partial(kept.make, requested, folder)
        seen = record_text(folder)
        if seen is not None and self.alone:
            check_free(folder)
        if seen is not None and not self.job.overwrite:
            run = RunDir.open(folder)
            if run.record["status"] != "beginning":
                if self._is_done(run, record):
                    return None
                on_all_hosts(check_weights, run)
                return Task(run, saved_layout(self.pipe, run), settings, seen=seen, refresh=refresh)
        run, layout, read = self._new(spec, folder, record)
        return Task(run, layout, settings, read, seen=seen, refresh=refresh)

    def _new(
        self, spec: VideoSpec, folder: epath.Path, record: dict[str, Any]
    ) -> tuple[RunDir, Layout, Callable[[], Inputs]]:
        """Return a new run, its layout, and a function that reads its inputs."""
        if spec.extend is not None and would_replace(folder, spec.extend):
            raise ValueError(
                f"--output {folder} holds the source of --extend; choose another --output"
            )
        request = on_all_hosts(read_request, self.pipe, spec)
        layout = layout_of_spec(self.pipe, spec, request)
        if request.end_image is not None:
            use = end_image_use(self.pipe.schedule, spec.end_image_as)
            record["flags"]["end_image_as"] = use
        check_folder(folder)
        record |= {
            "sections": layout.sections,
            "frames": layout.frames,
            "starts_empty": layout.before == 0,
            "height": layout.height,
            "width": layout.width,
            "canvas": list(layout.canvas),
            "key_frames": [seconds for seconds, _ in request.key_frames],
            "beginning": layout.kept,
        }
        # The images of many jobs would fill the memory, so they are read again before sampling.
        again = request if self.alone else None
        read = functools.partial(read_inputs, self.pipe, spec, layout, again)
        return RunDir(folder, record), layout, read

    def _is_done(self, run: RunDir, record: dict[str, Any]) -> bool:
        """Return whether a run needs no more work. Raises ValueError if it has other options, or,
        for a video `alone`, in any case."""
        if differing := differences(run.record, record):
            raise ValueError(
                f"{run.folder} already holds a run with other flags ({differing}); choose another"
                " --output or --overwrite"
            )
        status = run.record["status"]
        if self.alone:
            advice = "--overwrite samples it again"
            if status != "finished":
                advice = f"continue it with framepack resume {run.folder}, or {advice}"
            raise ValueError(
                f"{run.folder} already holds a run with these flags, {status}; {advice}"
            )
        return status in ("finished", "sampled" if self.job.latents_only else "finished")


def _with_seed(spec: VideoSpec, folder: epath.Path, overwrite: bool) -> VideoSpec:
    """Replace a random seed by that of the run in the folder, or by a new one."""
    if spec.seed != RANDOM_SEED:
        return spec
    exists = (folder / RECORD).exists() and not overwrite
    seed = RunDir.open(folder).record["flags"]["seed"] if exists else secrets.randbits(32)
    return dataclasses.replace(spec, seed=seed)


def saved_task(
    run: RunDir,
    bundle_name: str | None,
    dtype: str | None,
    compute: ComputeOptions,
    roles: Sequence[str] | None = None,
) -> tuple[FramePack, Task]:
    """Return the pipeline and the task of a run. Raises ValueError if the run has no request yet,
    or if the bundle, which may have moved, holds other weights for these roles now."""
    record = run.record
    if record["status"] == "beginning":
        raise ValueError(f"{run.folder} was stopped before its inputs were saved; start it again")
    if bundle_name is not None:
        record["bundle"] = absolute(bundle.resolve(bundle_name))
    elif record["flags"]["bundle"] in bundle.BUILTIN_BUNDLES:
        record["bundle"] = absolute(bundle.resolve(record["flags"]["bundle"]))
    on_all_hosts(check_weights, run, roles)
    check_bundle(record["bundle"], roles)
    pipe = on_all_hosts(
        open_pipe,
        record["bundle"],
        dtype or record["dtype"],
        record["schedule"],
        compute.vae_tile or record["flags"]["vae_tile"],
        compute.mesh or record["flags"].get("mesh"),
    )
    return pipe, Task(run, saved_layout(pipe, run), saved_spec(run).settings())


def describe(pipe: FramePack, task: Task) -> str:
    """Describe a video in one line, and its timed prompts in one line each."""
    layout, record = task.layout, task.run.record
    sampled = ""
    if layout.canvas != (layout.height, layout.width):
        sampled = f" (the middle of {layout.canvas[0]} x {layout.canvas[1]})"
    text = (
        f"{layout.sections} sections, {record['frames']} frames of {layout.height} x"
        f" {layout.width} pixels{sampled}, schedule {pipe.schedule}, {pipe.dtype} on"
        f" {record['device']}, seed {record['flags']['seed']}"
    )
    if record["flags"]["extend"]:
        alone = pipe.sampling.decode_alone
        given = layout.kept if alone else pipe.geometry.frames_of(0, layout.before)[1]
        text += f"; the first {given} frames are those of {record['flags']['extend']}"
    prompt = record["flags"]["prompt"]
    prompts = timed_prompts(prompt)
    if prompts != [(0.0, prompt)]:
        text += "".join(f"\n  from {seconds:g} s: {part}" for seconds, part in prompts)
    return text
