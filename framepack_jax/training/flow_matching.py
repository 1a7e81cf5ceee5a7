"""One step of training: flow matching on the frames of a section, given its packed context.

x_t = (1 - sigma) x + sigma noise, and the network predicts noise - x at the target frames; the
mean squared error is taken in float32 (Lipman et al., arXiv 2210.02747; noise levels after Esser
et al., arXiv 2403.03206). All that is random in a sample comes from its number in the endless
stream of samples, so that a step does not depend on how a batch is divided over hosts, devices or
parts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from framepack_jax.data.pixel_batch import PixelBatch, to_batch
from framepack_jax.diffusion import flow
from framepack_jax.packing import PackedContext, group_tokens
from framepack_jax.parallel.sharding import BATCH, constrain
from framepack_jax.training.config import NoiseSchedule, TrainConfig
from framepack_jax.training.state import (
    Model,
    Params,
    State,
    apply_gradients,
    factor_scale,
    merge_params,
)

# Frames (B, P, H, W, 3) in [-1, 1] -> normalised latents, for batches that hold frames.
Encode = Callable[[jax.Array], jax.Array]


class Metrics(NamedTuple):
    """Of one step: the mean loss and the norm of the gradient before clipping, whether the update
    was left out, and how many in a row have been; of each sample its loss, noise level, section
    (0: made first) and number of the record, (B,)."""

    loss: jax.Array
    grad_norm: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    losses: jax.Array
    sigmas: jax.Array
    sections: jax.Array
    clips: jax.Array


def train_step(
    cfg: TrainConfig,
    model: Model,
    tx: optax.GradientTransformation,
    encode: Callable[[Params, jax.Array], jax.Array] | None,
    state: State,
    frozen: Params,
    vae: Params,
    batch: Any,
    rate: jax.Array,
) -> tuple[State, Metrics]:
    """One update with the learning rate `rate`. Everything before `state` is static; `vae` are the
    parameters that `encode` takes for batches of frames, else empty."""

    def loss(params: Params, part: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        part = _latents(part, functools.partial(encode, vae) if encode else None)
        keys = sample_keys(cfg.seed, part.meta.element)
        sigmas = draw_sigmas(cfg.noise_schedule, keys, section_mu(part.target.shape))
        losses = sample_losses(cfg, model, params, frozen, part, keys, sigmas)
        return jnp.mean(losses), (losses, sigmas)

    def gradient(part: Any) -> Any:
        (_, seen), grads = jax.value_and_grad(loss, has_aux=True)(state.params, part)
        return grads, seen

    grads, (losses, sigmas) = _accumulated(gradient, batch, cfg.grad_accum_steps)
    mean = jnp.mean(losses)
    new, norm = apply_gradients(state, grads, mean, tx, cfg.ema, rate)
    skipped = new.skipped != state.skipped
    metrics = Metrics(
        mean,
        norm,
        skipped,
        new.skipped_in_a_row,
        losses,
        sigmas,
        batch.meta.section,
        batch.meta.clip,
    )
    return new, metrics


def losses_at(
    cfg: TrainConfig,
    model: Model,
    encode: Callable[[Params, jax.Array], jax.Array] | None,
    params: Params,
    frozen: Params,
    vae: Params,
    batch: Any,
    others: Any,
    sigma: jax.Array,
    blank: jax.Array,
    other: jax.Array,
) -> jax.Array:
    """Losses (B,) at one noise level, with noise that is the same each time.

    `blank` and `other` (groups,) say which context groups are zero, as where history is missing,
    and which are those of `others`, a batch like this one of other clips.
    """
    latents = functools.partial(encode, vae) if encode else None
    batch, others = _latents(batch, latents), _latents(others, latents)
    keys = sample_keys(cfg.seed, batch.meta.element)
    context = changed_context(batch.context, others.context, blank, other)
    batch = batch.replace(context=context)
    return sample_losses(
        cfg, model, params, frozen, batch, keys, jnp.full(batch.meta.element.shape, sigma)
    )


def sample_losses(
    cfg: TrainConfig,
    model: Model,
    params: Params,
    frozen: Params,
    batch: Any,
    keys: jax.Array,
    sigmas: jax.Array,
) -> jax.Array:
    """Mean squared error of the velocity (B,) of each sample at its noise level (B,)."""
    shape = batch.target.shape[1:]
    noise = jax.vmap(lambda key: jax.random.normal(_key(key, "noise"), shape))(keys)
    noise = constrain(noise, BATCH, *[None] * len(shape))
    context = batch.context
    if cfg.history_noise:
        context = noised_context(context, keys, cfg.history_noise)
    given = batch.conditions
    conditions = model.spec.conditions(
        given.text, given.text_valid, given.pooled, given.image,
        jnp.full(sigmas.shape, cfg.guidance, jnp.float32),
    )  # fmt: skip
    velocity = model.spec.velocity(
        model.cfg, merge_params(params, frozen, factor_scale(cfg)),
        flow.interpolate(batch.target, noise, sigmas), sigmas, context, conditions,
        jnp.dtype(cfg.dtype), remat=cfg.remat,
    )  # fmt: skip
    error = velocity - flow.velocity_target(batch.target, noise)
    return jnp.mean(jnp.square(error), axis=range(1, error.ndim))


def sample_keys(seed: int, elements: jax.Array) -> jax.Array:
    """A key for each sample (B,) by its number in the stream."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(elements)


# What is random in a sample.
_DRAWS = ("noise", "time", "history", "history_level")


def _key(key: jax.Array, draw: str) -> jax.Array:
    return jax.random.fold_in(key, _DRAWS.index(draw))


def draw_sigmas(schedule: NoiseSchedule, keys: jax.Array, mu: float) -> jax.Array:
    """Noise levels (B,)."""

    def draw(key: jax.Array) -> jax.Array:
        key = _key(key, "time")
        if schedule.distribution == "uniform":
            return jax.random.uniform(key)
        return jax.nn.sigmoid(schedule.mean + schedule.std * jax.random.normal(key))

    return flow.shift(jax.vmap(draw)(keys), mu if schedule.shift is None else schedule.shift)


def section_mu(shape: tuple[int, ...]) -> float:
    """The sampler's shift for a section of latents (B, w, h, W, C)."""
    _, window, height, width, _ = shape
    return flow.shift_mu(group_tokens(window, "k1", height, width))


def noised_context(context: PackedContext, keys: jax.Array, most: float) -> PackedContext:
    """Context latents at a noise level drawn from [0, most] for each sample; what is missing, and
    so zero, stays so."""
    levels = jax.vmap(lambda key: jax.random.uniform(_key(key, "history_level")))(keys) * most

    def noised(number: int, latents: jax.Array) -> jax.Array:
        def draw(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(_key(key, "history"), number)
            return jax.random.normal(key, latents.shape[1:])

        there = jnp.any(latents != 0, axis=(2, 3, 4), keepdims=True)
        moved = flow.interpolate(latents, jax.vmap(draw)(keys), levels)
        return jnp.where(there, moved, 0).astype(latents.dtype)

    return context.replace(latents=tuple(noised(i, x) for i, x in enumerate(context.latents)))


def changed_context(
    context: PackedContext, others: PackedContext, blank: jax.Array, other: jax.Array
) -> PackedContext:
    """The context with some groups blanked, and some taken from another of the same shape;
    `blank` and `other` are (groups,) bool."""
    latents = [
        jnp.where(blank[i], 0, jnp.where(other[i], theirs, own)).astype(own.dtype)
        for i, (own, theirs) in enumerate(zip(context.latents, others.latents, strict=True))
    ]
    return context.replace(latents=tuple(latents))


def _latents(batch: Any, encode: Encode | None) -> Any:
    return to_batch(batch, encode) if isinstance(batch, PixelBatch) else batch


def _accumulated(gradient: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """Mean gradient of equal parts of a batch, one after another, and what was seen of each
    sample, (B,)."""
    if parts == 1:
        return gradient(batch)
    # Every part takes of every device's samples.
    divided = jax.tree.map(lambda x: rearrange(x, "(b n) ... -> n b ...", n=parts), batch)

    def add(total: Params, part: Any) -> tuple[Params, Any]:
        grads, seen = gradient(part)
        return jax.tree.map(jnp.add, total, grads), seen

    first = jax.tree.map(lambda x: x[0], divided)
    zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), jax.eval_shape(gradient, first)[0])
    total, seen = jax.lax.scan(add, zeros, divided)
    grads = jax.tree.map(lambda g: g / parts, total)
    return grads, jax.tree.map(lambda x: rearrange(x, "n b -> (b n)"), seen)
