"""Flow-matching loss on the frames of a section, given its packed context.

x_t = (1 - sigma) x + sigma noise, and the network predicts noise - x at the target frames. The
mean squared error is taken in float32 (Lipman et al., arXiv 2210.02747; noise levels after Esser
et al., arXiv 2403.03206). The random numbers of a sample derive from its number in the endless
stream of samples, so a step does not depend on how a batch is divided over hosts, devices or parts.

Shapes: B batch, w latent window, h W latent rows and columns, C channels.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from framepack_jax.data.batch import Batch
from framepack_jax.diffusion import flow
from framepack_jax.packing import PackedContext, group_tokens
from framepack_jax.parallel.sharding import BATCH, constrain
from framepack_jax.training import draws
from framepack_jax.training.config import NoiseSchedule, TrainConfig
from framepack_jax.training.draws import Draw
from framepack_jax.training.state import Model, Params

# Levels where sampling starts, of which `NoiseSchedule.high` sets the number.
HIGH_SIGMA = 0.95
# The smallest distance of a quantile from 0 and 1 in float32.
EPS = 2.0**-24


class Examples(NamedTuple):
    """Examples for the network: at the noisy frames `x` (B, w, h, W, C) of levels `sigmas` (B,)
    to predict `velocity`, of the shape of x. All are float32."""

    x: jax.Array
    sigmas: jax.Array
    velocity: jax.Array


def examples(batch: Batch, keys: jax.Array, sigmas: jax.Array) -> Examples:
    """Return the examples of flow matching: noise - x at the levels `sigmas` (B,)."""
    noise = noise_of(batch, keys)
    x = flow.interpolate(batch.target, noise, sigmas)
    return Examples(x, sigmas, flow.velocity_target(batch.target, noise))


def noise_of(batch: Batch, keys: jax.Array) -> jax.Array:
    """Draw the noise of each sample, of the shape of the target."""
    shape = batch.target.shape[1:]
    return constrain(normal(keys, Draw.NOISE, shape), BATCH, *[None] * len(shape))


def sample_losses(
    cfg: TrainConfig, model: Model, params: Params, batch: Batch, keys: jax.Array, wanted: Examples
) -> jax.Array:
    """Return the mean squared error of the velocity of each sample, (B,).

    `params` are all parameters of the network."""
    found = velocity(cfg, model, params, batch, keys, wanted.x, wanted.sigmas, cfg.remat)
    error = found - wanted.velocity
    return jnp.mean(jnp.square(error), axis=range(1, error.ndim))


def velocity(
    cfg: TrainConfig,
    model: Model,
    params: Params,
    batch: Batch,
    keys: jax.Array,
    x: jax.Array,
    sigmas: jax.Array,
    remat: str = "none",
) -> jax.Array:
    """Return the velocity that a network predicts at x (B, w, h, W, C) of levels `sigmas` (B,),
    given the context and the conditions of a batch."""
    return model.spec.velocity(
        model.cfg, params, x, sigmas, batch.context, conditions_of(cfg, model, batch, keys),
        jnp.dtype(cfg.dtype), remat=remat,
    )  # fmt: skip


def conditions_of(cfg: TrainConfig, model: Model, batch: Batch, keys: jax.Array) -> Any:
    """Return the conditions of samples as the network reads them."""
    given, guidance = batch.conditions, guidance_of(cfg.guidance, keys)
    return model.spec.conditions(given.text, given.text_valid, given.pooled, given.image, guidance)


def sample_keys(key: jax.Array, elements: jax.Array) -> jax.Array:
    """Return a key for each sample (B,), from its number in the stream."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(elements)


def guidance_of(guidance: float | tuple[float, float], keys: jax.Array) -> jax.Array:
    """Return the guidance input of samples (B,): a value, or one drawn uniformly from a range."""
    if not isinstance(guidance, tuple):
        return jnp.full(keys.shape, guidance, jnp.float32)
    low, high = guidance
    return low + (high - low) * uniform(keys, Draw.GUIDANCE)


def uniform(keys: jax.Array, draw: Draw) -> jax.Array:
    """Draw a number in [0, 1) for each sample, (B,)."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, draw)))(keys)


def normal(keys: jax.Array, draw: Draw, shape: tuple[int, ...], *more: int) -> jax.Array:
    """Draw normal numbers (B, *shape); `more` are numbers beside that of the draw."""

    def one(key: jax.Array) -> jax.Array:
        return jax.random.normal(functools.reduce(jax.random.fold_in, (draw, *more), key), shape)

    return jax.vmap(one)(keys)


def draw_sigmas(
    schedule: NoiseSchedule, key: jax.Array, elements: jax.Array, batch: int, mu: float
) -> jax.Array:
    """Draw the noise levels of samples, (B,).

    Levels that are stratified are at evenly spaced quantiles of the distribution, of which each
    batch has another first one. A level follows from the number of its sample alone, so that it
    depends neither on hosts nor on parts of a batch.

    Args:
        schedule: Distribution.
        key: Key of all steps.
        elements: Numbers of the samples in the stream (B,).
        batch: Samples of a step.
        mu: Default shift.
    """
    mu = mu if schedule.mu is None else schedule.mu
    if not schedule.stratified:
        return flow.shift(_independent_times(schedule, sample_keys(key, elements)), mu)
    return sigma_at(schedule, spaced_quantiles(key, elements, batch), mu)


def spaced_quantiles(key: jax.Array, elements: jax.Array, batch: int) -> jax.Array:
    """Return numbers in [0, 1), (B,): those of a batch are evenly spaced from a random start."""
    of_levels = jax.random.fold_in(key, draws.LEVELS)
    first = jax.vmap(jax.random.uniform)(sample_keys(of_levels, elements // batch))
    return (first + elements % batch / batch) % 1


def _independent_times(schedule: NoiseSchedule, keys: jax.Array) -> jax.Array:
    def draw(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, Draw.TIME)
        if schedule.distribution == "uniform":
            return jax.random.uniform(key)
        return jax.nn.sigmoid(schedule.mean + schedule.std * jax.random.normal(key))

    return jax.vmap(draw)(keys)


def sigma_at(schedule: NoiseSchedule, quantiles: jax.Array, mu: float) -> jax.Array:
    """Return the noise levels at `quantiles` in [0, 1) of the distribution of levels, shifted by
    `mu`. With `schedule.high` its upper part is uniform above HIGH_SIGMA."""
    if schedule.high is None:
        return _base_sigma(schedule, quantiles, mu)
    below = 1 - schedule.high
    share = quantiles / max(below, EPS) * _share_below(schedule, flow.shift(HIGH_SIGMA, -mu))
    above = HIGH_SIGMA + (1 - HIGH_SIGMA) * (quantiles - below) / max(schedule.high, EPS)
    return jnp.where(quantiles < below, _base_sigma(schedule, share, mu), above)


def _base_sigma(schedule: NoiseSchedule, quantiles: jax.Array, mu: float) -> jax.Array:
    if schedule.distribution == "uniform":
        return flow.shift(quantiles, mu)
    normal = jax.scipy.special.ndtri(jnp.clip(quantiles, EPS, 1 - EPS))
    return flow.shift(jax.nn.sigmoid(schedule.mean + schedule.std * normal), mu)


def _share_below(schedule: NoiseSchedule, t: float) -> float:
    """Return the fraction of times below t."""
    if schedule.distribution == "uniform":
        return t
    distance = math.log(t / (1 - t)) - schedule.mean
    return (1 + math.erf(distance / max(schedule.std, EPS) / math.sqrt(2))) / 2


def section_mu(shape: tuple[int, ...]) -> float:
    """Return the shift that the sampler uses for a section of latents (B, w, h, W, C)."""
    return flow.shift_mu(section_tokens(shape))


def section_tokens(shape: tuple[int, ...]) -> int:
    """Return the number of tokens of a section of latents (B, w, h, W, C)."""
    _, window, height, width, _ = shape
    return group_tokens(window, "k1", height, width)


def changed_context(
    context: PackedContext, others: PackedContext, blank: jax.Array, other: jax.Array
) -> PackedContext:
    """Blank some groups of a context, and take others from `others`, a context of the same shape;
    `blank` and `other` are (groups,) bool."""
    latents = [
        jnp.where(blank[i], 0, jnp.where(other[i], theirs, own)).astype(own.dtype)
        for i, (own, theirs) in enumerate(zip(context.latents, others.latents, strict=True))
    ]
    masked = context.masked
    if masked is not None and others.masked is not None:
        # A tail ta, the first group, has no tokens if it is blank.
        masked = jnp.where(other[0], others.masked, masked)
        masked = jnp.where(blank[0], context.tail_tokens, masked)
    return dataclasses.replace(context, latents=tuple(latents), masked=masked)
