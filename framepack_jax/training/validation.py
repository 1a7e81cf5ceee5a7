"""What a model makes of clips it is not trained on: losses at fixed noise levels, whether it uses
its context, and videos.

Shapes: B batch, P frames, H W rows and columns.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from framepack_jax import packing
from framepack_jax.conditioning import MAX_PROMPT_TOKENS
from framepack_jax.data.pixels import PixelBatch
from framepack_jax.data.records import Record
from framepack_jax.pipeline import FramePack, Inputs, Network, Settings
from framepack_jax.processes import fetch
from framepack_jax.splice import to_uint8
from framepack_jax.training.state import Model

# (batch on the devices, sigma, context groups that are blank, those of another clip) -> losses (B,)
LossesAt = Callable[[Any, np.float32, np.ndarray, np.ndarray], jax.Array]


class Difference(NamedTuple):
    """A mean difference of paired losses and its standard error."""

    mean: float
    error: float


def losses(
    losses_at: LossesAt, batches: Iterable[Any], sigmas: Sequence[float], context: bool
) -> dict[str, float]:
    """Mean loss of batches at each noise level and over all. With `context`, also how much higher
    it is with each kernel's groups blanked or taken from another clip: positive figures, beyond
    their standard errors, say that the history is used."""
    seen = paired(losses_at, batches, sigmas, context)
    whole = seen.pop(())
    figures = {"validation/loss": float(whole.mean())}
    for sigma, values in zip(sigmas, whole, strict=True):
        figures[f"validation/loss_sigma_{sigma:g}"] = float(values.mean())
    for name, values in seen.items():
        found = difference(values, whole)
        figures[f"context/{'_'.join(name)}"] = found.mean
        figures[f"context/{'_'.join(name)}_error"] = found.error
    return figures


def paired(
    losses_at: LossesAt, batches: Iterable[Any], sigmas: Sequence[float], context: bool
) -> dict[tuple[str, ...], np.ndarray]:
    """Losses (noise levels, samples): under () of the batches as they are, under (kernel, "blank")
    and (kernel, "other") with that kernel's context changed."""
    found: dict[tuple[str, ...], list[np.ndarray]] = {}
    for batch in batches:
        groups = np.asarray(kernels_of(batch))
        none = np.zeros(len(groups), bool)
        variants = {(): (none, none)}
        for kernel in dict.fromkeys(groups.tolist()) if context else ():
            variants[kernel, "blank"] = groups == kernel, none
            variants[kernel, "other"] = none, groups == kernel
        for name, (blank, other) in variants.items():
            each = [losses_at(batch, np.float32(sigma), blank, other) for sigma in sigmas]
            found.setdefault(name, []).append(np.stack(jax.device_get(fetch(each))))
    return {name: np.concatenate(parts, axis=1) for name, parts in found.items()}


def kernels_of(batch: Any) -> tuple[str, ...]:
    """Kernels of a batch's context groups, of latents or of frames."""
    return batch.kernels if isinstance(batch, PixelBatch) else batch.context.kernels


def difference(changed: np.ndarray, whole: np.ndarray) -> Difference:
    """Of losses (noise levels, samples), the mean over levels taken sample by sample."""
    each = (changed - whole).mean(axis=0)
    return Difference(float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))))


def sample_video(
    pipe: FramePack, record: Record, sections: int, settings: Settings, seed: int
) -> np.ndarray:
    """A video (P, H, W, 3) uint8 from the start image and the conditions of a clip."""
    plan = packing.plan(pipe.schedule, pipe.order, sections)
    text = np.zeros((1, MAX_PROMPT_TOKENS, record.text.shape[1]), record.text.dtype)
    text[0, : len(record.text)] = record.text
    valid = (np.arange(text.shape[1]) < len(record.text))[None]
    conditions = pipe.transformer.model.Conditions(
        jnp.asarray(text, pipe.dtype), jnp.asarray(valid),
        jnp.asarray(record.pooled[None], pipe.dtype), jnp.asarray(record.image[None], pipe.dtype),
        jnp.full(1, settings.guidance, jnp.float32),
    )  # fmt: skip
    known = {0: np.asarray(record.latents[:1], np.float32)}
    made = pipe.sample(plan, Inputs([conditions], None, known), settings, seeds=[seed])
    clips = {start: frames for _, start, frames, _ in pipe.decode(plan, made)}
    frames = np.concatenate([np.asarray(clips[start]) for start in sorted(clips)], axis=1)
    return np.asarray(to_uint8(jnp.asarray(frames), record.clip.height, record.clip.width))[0]


def decoded_clip(pipe: FramePack, record: Record, positions: int) -> np.ndarray:
    """The first latent positions of a clip as the VAE shows them, (P, H, W, 3) uint8."""
    latents = np.asarray(record.latents[None, :positions], np.float32)
    timeline = packing.Timeline(latents.shape[1], latents.shape[2:])
    timeline.write(range(latents.shape[1]), latents)
    section = packing.plan(pipe.schedule, pipe.order, 1)[0]
    section = dataclasses.replace(section, decode=(0, latents.shape[1]))
    frames = pipe.decode_clip(section, timeline)
    return np.asarray(to_uint8(frames, record.clip.height, record.clip.width))[0]


def side_by_side(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Frames of two videos, one above the other, as long as the shorter."""
    count = min(len(made), len(truth))
    return np.concatenate([made[:count], truth[:count]], axis=1)


def open_pipe(path: epath.PathLike, schedule: str, dtype: str, mesh: Mesh) -> FramePack:
    """The pipeline of a bundle with its VAE, and no transformer yet. Raises BundleError."""
    pipe = FramePack.open(path, dtype=dtype, schedule=schedule, mesh=mesh)
    return pipe.with_weights(path, roles=("vae",))


def with_network(pipe: FramePack, model: Model, params: Any) -> FramePack:
    """The same with the network that is trained."""
    return dataclasses.replace(pipe, transformer=Network(model.module, model.cfg, params))
