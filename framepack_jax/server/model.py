"""The bundle that a server has loaded, and the checks of a video before it is queued."""

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

from etils import epath

from framepack_jax import bundle, video
from framepack_jax.generation.layout import Layout
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.jobs.inputs import fps_of, layout_of_spec, read_request
from framepack_jax.jobs.loading import check_bundle, check_devices, open_pipe, read_loras
from framepack_jax.jobs.spec import ComputeOptions, JobOptions, ModelOptions, VideoSpec
from framepack_jax.jobs.task import Task
from framepack_jax.jobs.task_setup import TaskMaker

DEFAULT_JOB = JobOptions()


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A loaded bundle.

    Args:
        name: Name of the bundle, which clients see.
        maker: Makes the tasks of jobs.
        max_pixels: Largest area of a video.
        machine: Fields of run records that depend on this machine.
        batch: Number of videos that are sampled side by side.
    """

    name: str
    maker: TaskMaker
    max_pixels: int
    machine: dict[str, Any]
    batch: int = 1

    @property
    def pipe(self) -> FramePack:
        """The pipeline with its weights."""
        return self.maker.pipe

    def check(self, spec: VideoSpec) -> Layout:
        """Return the layout of a video. Raises ValueError if it cannot be sampled: an unreadable
        image, an impossible size, options that contradict each other."""
        spec = spec.filled(self.pipe.sampling)
        video.check_encoding(fps_of(spec), spec.crf)
        settings = spec.settings()
        settings.check(self.pipe.transformer.spec, self.pipe.sampling, self.pipe.schedule)
        layout = layout_of_spec(self.pipe, spec, read_request(self.pipe, spec))
        if (pixels := layout.height * layout.width) > self.max_pixels:
            raise ValueError(
                f"size {layout.width}x{layout.height} has {pixels} pixels, at most"
                f" {self.max_pixels} are allowed"
            )
        return layout

    def task(self, spec: VideoSpec, folder: Path) -> Task | None:
        """Return the task of a run folder, None if its video is finished. Raises ValueError,
        OSError."""
        task = self.maker.make(spec, epath.Path(folder))
        if task is not None:
            task.run.record |= self.machine
        return task


def load_model(
    model: ModelOptions, compute: ComputeOptions, max_pixels: int | None, batch: int = 1
) -> ServedModel:
    """Load a bundle with its adapters, for `batch` videos of up to `max_pixels`.

    Raises ValueError, OSError, and the errors in `errors.FAILURES`.
    """
    if model.merge_lora and not model.lora:
        warnings.warn("--merge-lora has an effect only with --lora", stacklevel=1)
    path = bundle.resolve(model.bundle_name())
    pipe = open_pipe(path, model.dtype, model.schedule, compute.vae_tile, compute.mesh)
    check_bundle(path)
    check_devices(pipe, batch)
    adapters = read_loras(pipe, model.lora)
    canvas = max(pipe.buckets, key=math.prod)
    if max_pixels is not None:
        canvas = (math.isqrt(max_pixels),) * 2
    offload = compute.offload or "auto"
    plan = pipe.plan(path, offload, canvas, batch)
    pipe = pipe.with_weights(path, None, plan)
    pipe = pipe.with_lora(adapters, merge=model.merge_lora) if adapters else pipe
    return ServedModel(
        name=Path(model.bundle_name()).name,
        maker=TaskMaker(pipe, model, compute, DEFAULT_JOB, alone=False),
        max_pixels=max_pixels or math.prod(canvas),
        machine={"offload": offload, "decode_tile": plan.tiling.size},
        batch=batch,
    )
