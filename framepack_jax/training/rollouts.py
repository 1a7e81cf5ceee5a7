"""Replace the history of training samples by the network's own prediction of it.

Sampled history has the errors of the network, the true one has not (exposure bias). Training on own
rollouts, or self-augmentation, is one of the methods that FramePack is compared with. The details
are ours: in some steps, evenly spaced, all frames of history are noised to one level a sample and
denoised in one step, as the target of a section without history: x0 = x_t - sigma v.
No gradient flows through it. Anchor, ending, start image and a tail stay as they are, and missing
frames stay zero.

Shapes: B batch, F frames of history, h W latent rows and columns, C channels.
"""

import dataclasses

import jax
import jax.numpy as jnp

from framepack_jax import packing
from framepack_jax.data.batch import Batch
from framepack_jax.diffusion import flow
from framepack_jax.packing import PackedContext, Schedule
from framepack_jax.packing.form import form_of
from framepack_jax.packing.orders import blank_groups
from framepack_jax.parallel.sharding import BATCH, constrain
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.draws import Draw
from framepack_jax.training.flow_matching import conditions_of, normal, uniform
from framepack_jax.training.state import Model, Params

# Steps after which the choice of steps begins again.
PERIOD = 1000


def history_groups(schedule: Schedule) -> list[int]:
    """Return the groups of context that are predicted, in order of time."""
    form = form_of(schedule)
    groups = blank_groups(form)
    found = [i for i, g in enumerate(groups) if g.reads[0] >= 0 and not packing.tail_of(g.kernel)]
    return sorted(found, key=lambda i: groups[i].reads[0], reverse=form.backward)


def history_frames(schedule: Schedule) -> int:
    """Return the number of latent frames that are predicted at once."""
    ages = packing.history_ages(schedule)
    return sum(len(ages[group]) for group in history_groups(schedule))


def check(cfg: TrainConfig, schedule: Schedule) -> None:
    """Raise ValueError if there is no history to predict, or if it does not follow in time."""
    if not cfg.history.rollouts:
        return
    flag = f"--history.rollouts {cfg.history.rollouts:g}: schedule {schedule}"
    if not history_groups(schedule):
        raise ValueError(
            f"{flag} reads no history that could be predicted; leave it out, or give a schedule"
            " with history"
        )
    if schedule.importance:
        raise ValueError(
            f"{flag} orders history by importance, and only frames that follow each other are"
            f" predicted together; leave it out, or remove ~{schedule.importance}"
        )


def rolls_out(step: jax.Array, share: float) -> jax.Array:
    """Return whether step `step`, counted from 0, is one of the `share` of steps whose history is
    predicted: evenly spaced, 0.5 being every second step."""
    count = max(1, round(PERIOD * share))
    return (step % PERIOD + 1) * count % PERIOD < count


def with_rollouts(
    cfg: TrainConfig,
    model: Model,
    params: Params,
    schedule: Schedule,
    batch: Batch,
    keys: jax.Array,
) -> PackedContext:
    """Return the context of a batch, in a step that rolls out with predicted history."""
    if not cfg.history.rollouts:
        return batch.context
    step = batch.meta.element[0] // cfg.batch
    latents = jax.lax.cond(
        rolls_out(step, cfg.history.rollouts),
        lambda: _predicted(cfg, model, params, schedule, batch, keys),
        lambda: tuple(map(jnp.asarray, batch.context.latents)),
    )
    return dataclasses.replace(batch.context, latents=jax.lax.stop_gradient(latents))


def _predicted(
    cfg: TrainConfig,
    model: Model,
    params: Params,
    schedule: Schedule,
    batch: Batch,
    keys: jax.Array,
) -> tuple[jax.Array, ...]:
    """Return the latents of the context by group, those of history predicted."""
    context, groups = batch.context, history_groups(schedule)
    latents = list(map(jnp.asarray, context.latents))
    target = jnp.concatenate([latents[group] for group in groups], axis=1)
    noise = normal(keys, Draw.ROLLOUT_NOISE, target.shape[1:])
    noise = constrain(noise, BATCH, *[None] * (noise.ndim - 1))
    sigmas = cfg.history.rollout_level * uniform(keys, Draw.ROLLOUT_LEVEL)
    x = flow.interpolate(target, noise, sigmas)
    velocity = model.spec.velocity(
        model.cfg, jax.lax.stop_gradient(params), x, sigmas, _alone(context, schedule, groups),
        conditions_of(cfg, model, batch, keys), jnp.dtype(cfg.dtype),
    )  # fmt: skip
    made = flow.x0_from_velocity(x, velocity, sigmas)
    given = jnp.concatenate([jnp.asarray(batch.given[group]) for group in groups], axis=1)
    kept = given[:, :, None, None, None] | ~jnp.any(target != 0, axis=(2, 3, 4), keepdims=True)
    made = jnp.where(kept, target, made).astype(target.dtype)
    first = 0
    for group in groups:
        stop = first + latents[group].shape[1]
        latents[group] = made[:, first:stop]
        first = stop
    return tuple(latents)


def _alone(context: PackedContext, schedule: Schedule, groups: list[int]) -> PackedContext:
    """Return the context of history as a target: the anchor and the ending, and no history."""
    ages = packing.history_ages(schedule)
    latents = [
        jnp.zeros_like(frames) if age[0] >= 0 else frames
        for age, frames in zip(ages, context.latents, strict=True)
    ]
    masked = context.masked
    if masked is not None:
        masked = jnp.full_like(masked, context.tail_tokens)
    indices = jnp.concatenate([jnp.asarray(context.indices[group]) for group in groups], axis=1)
    return dataclasses.replace(
        context, latents=tuple(latents), target_indices=indices, masked=masked
    )
