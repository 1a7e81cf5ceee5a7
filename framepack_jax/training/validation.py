"""Validation on held-out clips: losses at fixed noise levels, the use of context, and videos.

Shapes: B batch, P frames, H W rows and columns.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from framepack_jax import packing, video
from framepack_jax.data.pixel_batch import PixelBatch
from framepack_jax.data.records import Record
from framepack_jax.data.samples import conditions_of
from framepack_jax.generation.crossfade import to_uint8
from framepack_jax.generation.pipeline import FramePack, Inputs, Network, OnStep, Settings
from framepack_jax.models.lora_layers import scale_factors
from framepack_jax.models.params import merge_params
from framepack_jax.parallel.multihost import fetch, on_primary
from framepack_jax.training import consistency, state
from framepack_jax.training.metrics import validation_folder
from framepack_jax.training.prefetch import place
from framepack_jax.training.state import Model, Params

if TYPE_CHECKING:
    from framepack_jax.training.flow_matching_task import FlowMatchingTask, Networks

# (batch on the devices, batch of other clips, sigma, context groups to blank, context groups to
# take from the other clips) -> losses (B,)
LossesAt = Callable[[Any, Any, np.float32, np.ndarray, np.ndarray], jax.Array]


class Validator:
    """Held-out batches on the devices, and the pipeline that samples videos."""

    def __init__(self, task: "FlowMatchingTask") -> None:
        self.task, cfg = task, task.cfg
        ways = task.mesh.shape["data"] * task.mesh.shape["fsdp"]
        held = task.loader.held_out(cfg.validation.samples, cfg.batch // cfg.grad_accum_steps, ways)
        self.batches = [
            (place(batch, task.mesh, size), others and place(others, task.mesh, size))
            for batch, others, size in held
        ]
        self.losses_at = jax.jit(task.losses_at)
        samples = task.loader.samples
        self.dataset_of = (
            None if len(samples.datasets) == 1 else lambda n: samples.dataset_of(n).name
        )
        self.records = task.loader.held_out_records(cfg.validation.videos)
        self.pipe: FramePack | None = None

    def __call__(
        self, step: int, params: Params, frozen: "Networks", check: Callable[[], None]
    ) -> dict[str, float]:
        """Return the losses of held-out clips, and write sampled videos. Calls `check`, which may
        raise, before each batch and after each step of sampling."""
        cfg = self.task.cfg

        def at(*args: Any) -> jax.Array:
            check()
            return self.losses_at(params, frozen, *args)

        with jax.set_mesh(self.task.mesh):
            figures = losses(
                at, self.batches, cfg.validation.sigmas, cfg.validation.context, self.dataset_of
            )
        for number, frames in enumerate(self.videos(params, frozen.transformer, check)):
            fps = self.task.manifest.sampling.fps
            on_primary(save_video, cfg.output, step, number, frames, fps)
        return figures

    def videos(
        self, params: Params, frozen: Params, check: Callable[[], None]
    ) -> Iterator[np.ndarray]:
        """Yield sampled videos above the decoded clips, (P, H, W, 3) uint8."""
        task, cfg = self.task, self.task.cfg.validation
        if not cfg.videos or task.encode is not None:
            return
        if self.pipe is None:
            self.pipe = open_pipe(task)
        network = merge_params(scale_factors(params, state.factor_scale(task.cfg)), frozen)
        pipe = with_network(self.pipe, task.model, network)
        window = task.schedule.window
        for number, record in enumerate(self.records):
            assert record.latents is not None
            given = given_frames(pipe)
            most = (len(record.latents) - given) // window
            sections = min(cfg.sections, most) if task.schedule.segments else 1
            steps = task.cfg.distill.steps or cfg.steps
            settings = Settings(steps=steps, distilled_guidance=cfg.guidance)
            plan = plan_of(pipe, sections)
            conditions = conditions_of_clip(
                pipe, record, task.manifest.text_tokens, settings.distilled_guidance
            )
            made = sample_video(
                pipe, record, plan, conditions, settings, number, lambda *_: check()
            )
            yield side_by_side(made, decoded_clip(pipe, record, plan))


def save_video(
    output: epath.PathLike, step: int, number: int, frames: np.ndarray, fps: float
) -> None:
    """Write a validation video and its contact sheet to RUN/validation."""
    folder = validation_folder(output, step)
    folder.mkdir(parents=True, exist_ok=True)
    video.write_mp4(folder / f"{number}.mp4", frames, fps)
    video.save_png(folder / f"{number}.png", video.contact_sheet(frames, fps))


class Losses(NamedTuple):
    """Losses of held-out samples (noise levels, samples), and the clip number of each sample
    (samples,)."""

    values: np.ndarray
    clips: np.ndarray


class Difference(NamedTuple):
    """Mean difference of paired losses and its standard error, None for a single clip."""

    mean: float
    error: float | None


def losses(
    losses_at: LossesAt,
    batches: Iterable[tuple[Any, Any]],
    sigmas: Sequence[float],
    context: bool,
    dataset_of: Callable[[int], str] | None = None,
) -> dict[str, float]:
    """Return the mean loss at each noise level and over all levels; every clip has equal weight.

    If `dataset_of` gives the names of the datasets of clips, also return the mean loss of each.

    `batches` are pairs of a batch and one of other clips, or None. With `context`, also return the
    increase of the loss when the context groups of a kernel are blanked, or taken from the other
    clips. An increase beyond its standard error shows that the model uses its history."""
    seen = paired(losses_at, batches, sigmas, context)
    whole = seen.pop(())
    levels = by_clip(whole.values, whole.clips).mean(axis=1)
    figures = {"validation/loss": float(levels.mean())}
    for sigma, value in zip(sigmas, levels, strict=True):
        figures[f"validation/loss_sigma_{sigma:g}"] = float(value)
    if dataset_of is not None:
        names = np.asarray([dataset_of(clip) for clip in whole.clips.tolist()])
        for name in dict.fromkeys(names.tolist()):
            mine = names == name
            each = by_clip(whole.values[:, mine], whole.clips[mine])
            figures[f"validation/loss_of_{name}"] = float(each.mean())
    for name, changed in seen.items():
        found = difference(changed, whole)
        figures[f"context/{'_'.join(name)}"] = found.mean
        if found.error is not None:
            figures[f"context/{'_'.join(name)}_error"] = found.error
    return figures


def paired(
    losses_at: LossesAt,
    batches: Iterable[tuple[Any, Any]],
    sigmas: Sequence[float],
    context: bool,
) -> dict[tuple[str, ...], Losses]:
    """Return the losses of the unchanged batches under (), and with the context of a kernel changed
    under (kernel, "blank") and (kernel, "other"). Samples repeated to fill a batch count once."""
    found: dict[tuple[str, ...], list[Losses]] = {}
    for batch, others in batches:
        groups = np.asarray(kernels_of(batch))
        none = np.zeros(len(groups), bool)
        variants: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {(): (none, none)}
        for kernel in dict.fromkeys(groups.tolist()) if context else ():
            variants[kernel, "blank"] = groups == kernel, none
            if others is not None:
                variants[kernel, "other"] = none, groups == kernel
        elements, clips = jax.device_get(fetch((batch.meta.element, batch.meta.clip)))
        _, once = np.unique(elements, return_index=True)
        for name, changes in variants.items():
            each = [
                losses_at(batch, batch if others is None else others, np.float32(sigma), *changes)
                for sigma in sigmas
            ]
            values = np.stack(jax.device_get(fetch(each)))
            found.setdefault(name, []).append(Losses(values[:, once], clips[once]))
    return {
        name: Losses(*(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)))
        for name, parts in found.items()
    }


def kernels_of(batch: Any) -> tuple[str, ...]:
    """Return the kernels of the context groups of a batch of latents or of frames."""
    return batch.kernels if isinstance(batch, PixelBatch) else batch.context.kernels


def by_clip(values: np.ndarray, clips: np.ndarray) -> np.ndarray:
    """Average samples (..., samples) over each clip to (..., clips)."""
    return np.stack([values[..., clips == clip].mean(axis=-1) for clip in np.unique(clips)], -1)


def difference(changed: Losses, whole: Losses) -> Difference:
    """Return the mean difference over noise levels and clips, paired by sample. Only clips in both
    are compared."""
    both = np.isin(whole.clips, changed.clips)
    each = by_clip((changed.values - whole.values[:, both]).mean(axis=0), changed.clips)
    spread = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
    return Difference(float(each.mean()), spread)


def given_frames(pipe: FramePack) -> int:
    """Return the number of latent frames of a clip that its sampled video begins with."""
    return 0 if pipe.sampling.decode_alone else packing.start_frames(pipe.schedule)


def plan_of(pipe: FramePack, sections: int) -> list[packing.Section]:
    """Return the plan of a video that begins as the clips of training do."""
    alone = pipe.sampling.decode_alone
    return packing.plan(pipe.schedule, sections, before=given_frames(pipe), alone=alone)


def conditions_of_clip(pipe: FramePack, record: Record, tokens: int, guidance: float) -> Any:
    """Return the network's conditions of a clip whose caption is padded to `tokens`."""

    def cast(x: np.ndarray) -> jax.Array:
        return jnp.asarray(x[None], None if x.dtype == bool else pipe.dtype)

    given = jax.tree.map(cast, conditions_of(record, tokens))
    return pipe.transformer.spec.conditions(
        given.text, given.text_valid, given.pooled, given.image,
        jnp.full(1, guidance, jnp.float32),
    )  # fmt: skip


def sample_video(
    pipe: FramePack,
    record: Record,
    plan: Sequence[packing.Section],
    conditions: Any,
    settings: Settings,
    seed: int,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Sample a video (P, H, W, 3) uint8 from conditions, and from the start image of a clip if the
    plan has one; calls `on_step` after each step."""
    assert record.latents is not None
    known = {p: np.asarray(record.latents[p][None], np.float32) for p in range(given_frames(pipe))}
    inputs = Inputs([conditions], None, known, (1, *record.latents.shape[1:]))
    made = pipe.sample(plan, inputs, settings, seeds=[seed], on_step=on_step)
    clips = {start: frames for _, start, frames, _ in pipe.decode(plan, made)}
    frames = np.concatenate([np.asarray(clips[start]) for start in sorted(clips)], axis=1)
    return np.asarray(to_uint8(jnp.asarray(frames), record.clip.height, record.clip.width))[0]


def decoded_clip(pipe: FramePack, record: Record, plan: Sequence[packing.Section]) -> np.ndarray:
    """Decode the latents of a clip that a plan makes, to (P, H, W, 3) uint8: at once, or section by
    section if these are decoded alone."""
    assert record.latents is not None
    latents = np.asarray(record.latents[None, : packing.length(plan)], np.float32)
    timeline = packing.Timeline.of(latents)
    clips = [(0, latents.shape[1])]
    if pipe.sampling.decode_alone:
        clips = [clip for section in plan for clip in section.decode]
    frames = jnp.concatenate([pipe.decode_clip(clip, timeline) for clip in clips], axis=1)
    return np.asarray(to_uint8(frames, record.clip.height, record.clip.width))[0]


def side_by_side(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Stack two videos, one above the other, cut to the length of the shorter."""
    count = min(len(made), len(truth))
    return np.concatenate([made[:count], truth[:count]], axis=1)


def open_pipe(task: "FlowMatchingTask") -> FramePack:
    """Open the bundle of a run with its VAE, without a transformer. Raises BundleError."""
    cfg, path = task.cfg, task.bundle_path
    pipe = FramePack.open(
        path, dtype=cfg.dtype, schedule=task.schedule, mesh=task.mesh, codebook=cfg.codebook
    )
    sampling = consistency.student_sampling(cfg, pipe.sampling)
    return dataclasses.replace(pipe, sampling=sampling).with_weights(path, roles=("vae",))


def with_network(pipe: FramePack, model: Model, params: Any) -> FramePack:
    """Return the pipeline with the trained network."""
    return dataclasses.replace(pipe, transformer=Network(model.spec, model.cfg, params))
