"""Flow-matching loss on the frames of a section, given its packed context.

x_t = (1 - sigma) x + sigma noise, and the network predicts noise - x at the target frames. The
mean squared error is taken in float32 (Lipman et al., arXiv 2210.02747; noise levels after Esser
et al., arXiv 2403.03206). The random numbers of a sample derive from its number in the endless
stream of samples, so a step does not depend on how a batch is divided over hosts, devices or parts.

Shapes: B batch, w latent window, h W latent rows and columns, C channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from framepack_jax.data.batch import Batch
from framepack_jax.diffusion import flow
from framepack_jax.packing import PackedContext, group_tokens
from framepack_jax.parallel.sharding import BATCH, constrain
from framepack_jax.training.config import NoiseSchedule, TrainConfig
from framepack_jax.training.state import Model, Params


def sample_losses(
    cfg: TrainConfig,
    model: Model,
    params: Params,
    batch: Batch,
    keys: jax.Array,
    sigmas: jax.Array,
) -> jax.Array:
    """Return the mean squared error of the velocity of each sample at its noise level, (B,).

    `params` are all parameters of the network."""
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
        model.cfg, params, flow.interpolate(batch.target, noise, sigmas), sigmas, context,
        conditions, jnp.dtype(cfg.dtype), remat=cfg.remat,
    )  # fmt: skip
    error = velocity - flow.velocity_target(batch.target, noise)
    return jnp.mean(jnp.square(error), axis=range(1, error.ndim))


def sample_keys(key: jax.Array, elements: jax.Array) -> jax.Array:
    """Return a key for each sample (B,), from its number in the stream."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(elements)


# The random draws of a sample.
_DRAWS = ("noise", "time", "history", "history_level")


def _key(key: jax.Array, draw: str) -> jax.Array:
    return jax.random.fold_in(key, _DRAWS.index(draw))


def draw_sigmas(schedule: NoiseSchedule, keys: jax.Array, mu: float) -> jax.Array:
    """Draw the noise levels of samples, (B,). `mu` is the default shift."""

    def draw(key: jax.Array) -> jax.Array:
        key = _key(key, "time")
        if schedule.distribution == "uniform":
            return jax.random.uniform(key)
        return jax.nn.sigmoid(schedule.mean + schedule.std * jax.random.normal(key))

    return flow.shift(jax.vmap(draw)(keys), mu if schedule.shift is None else schedule.shift)


def section_mu(shape: tuple[int, ...]) -> float:
    """Return the shift that the sampler uses for a section of latents (B, w, h, W, C)."""
    _, window, height, width, _ = shape
    return flow.shift_mu(group_tokens(window, "k1", height, width))


def noised_context(context: PackedContext, keys: jax.Array, most: float) -> PackedContext:
    """Add noise to the context, at a level drawn from [0, most] for each sample. Missing frames,
    which are zero, stay zero."""
    levels = jax.vmap(lambda key: jax.random.uniform(_key(key, "history_level")))(keys) * most

    def noised(number: int, latents: jax.Array) -> jax.Array:
        def draw(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(_key(key, "history"), number)
            return jax.random.normal(key, latents.shape[1:])

        present = jnp.any(latents != 0, axis=(2, 3, 4), keepdims=True)
        moved = flow.interpolate(latents, jax.vmap(draw)(keys), levels)
        return jnp.where(present, moved, 0).astype(latents.dtype)

    latents = tuple(noised(i, jnp.asarray(x)) for i, x in enumerate(context.latents))
    return dataclasses.replace(context, latents=latents)


def changed_context(
    context: PackedContext, others: PackedContext, blank: jax.Array, other: jax.Array
) -> PackedContext:
    """Blank some groups of a context, and take others from `others`, a context of the same shape;
    `blank` and `other` are (groups,) bool."""
    latents = [
        jnp.where(blank[i], 0, jnp.where(other[i], theirs, own)).astype(own.dtype)
        for i, (own, theirs) in enumerate(zip(context.latents, others.latents, strict=True))
    ]
    return dataclasses.replace(context, latents=tuple(latents))
