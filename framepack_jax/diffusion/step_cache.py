"""Step caches: skip the transformer blocks at steps where they would change little.

The blocks take nearly all of a step's time, and what they add to the image tokens changes slowly
from step to step. A cache looks at something cheap, the *signal*; where it has moved little, the
residual that the blocks added when they last ran is added again, and the head does the rest.

* "tea", TeaCache (Liu et al., arXiv 2411.19108): the signal is the modulated input of the first
  block. Its relative changes from step to step pass through a polynomial fitted to the network and
  add up; the blocks run when the sum reaches the threshold, and at the first and the last step.
* "first-block" (ParaAttention's first block cache, as diffusers has it): the first block always
  runs and what it adds is the signal. The others run when it differs from that of the last step at
  which they ran by more than the threshold, relatively.

Samples of a batch decide for themselves: one that does not need the blocks keeps its residual also
where they run for another.

Shapes: B batch, L image tokens, D width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax.diffusion.network import Array, Network, Pass, Prediction, is_array

THRESHOLDS = {"tea": 0.15, "first-block": 0.05}
"""Kinds of cache, and the threshold that the release and diffusers use for each."""


@dataclasses.dataclass(frozen=True)
class StepCacheConfig:
    """Kind of step cache, and the change that it lets pass; `threshold` None takes the kind's own.

    A higher threshold skips more steps. Raises ValueError for an unknown kind, and for a threshold
    that is not finite and positive.
    """

    kind: str = "tea"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in THRESHOLDS:
            raise ValueError(f"step cache {self.kind!r}: expected one of {', '.join(THRESHOLDS)}")
        threshold = THRESHOLDS[self.kind] if self.threshold is None else self.threshold
        if not (math.isfinite(threshold) and threshold > 0):
            raise ValueError(
                f"threshold of the step cache = {threshold}: expected a number above 0"
            )
        object.__setattr__(self, "threshold", threshold)


class State(NamedTuple):
    """State between two steps of one pass through the network."""

    signal: jax.Array
    """(B, L, D): signal to compare the next one with."""
    residual: jax.Array
    """(B, L, D): change of the image tokens by the blocks when they last ran."""
    total: jax.Array
    """(B,) float32: change since the blocks last ran ("tea")."""


def start(shape: Sequence[int], dtype: jnp.dtype) -> State:
    """Return the state before the first step, for image tokens (B, L, D) of `dtype`."""
    return State(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape[0], jnp.float32))


def forced(kind: str, steps: int) -> np.ndarray:
    """Return (steps,) bool: steps at which the blocks always run."""
    step = np.arange(steps)
    return (step == 0) | (step == steps - 1) if kind == "tea" else step == 0


@functools.partial(jax.jit, static_argnames="polynomial")
def tea(
    state: State,
    signal: jax.Array,
    forced: jax.Array,
    threshold: jax.Array,
    polynomial: Sequence[float],
) -> tuple[jax.Array, State]:
    """Decide by TeaCache: (samples that need the blocks (B,) bool, next state).

    `polynomial` lists coefficients, highest power first. The signal (B, L, D) is kept as the next
    step's measure whether or not the blocks run. `forced` and `threshold` are scalars.
    """
    estimate = jnp.zeros_like(state.total)
    change = relative_change(signal, state.signal)
    for coefficient in polynomial:
        estimate = estimate * change + coefficient
    total = state.total + estimate
    # Not (below): a change that is not a number must not keep the blocks from running.
    need = forced | ~(total < threshold)
    return need, State(signal, state.residual, jnp.where(need, 0.0, total))


@jax.jit
def first_block(
    state: State, signal: jax.Array, forced: jax.Array, threshold: jax.Array
) -> tuple[jax.Array, State]:
    """Decide by first block cache: (samples that need the other blocks (B,) bool, next state).

    The signal (B, L, D) is kept only where the blocks run, so that slow changes add up.
    """
    need = forced | ~(relative_change(signal, state.signal) <= threshold)
    return need, state._replace(signal=jnp.where(_over(need), signal, state.signal))


def relative_change(signal: jax.Array, before: jax.Array) -> jax.Array:
    """Return mean |signal - before| / mean |before| of each sample, (B,) float32."""
    signal, before = signal.astype(jnp.float32), before.astype(jnp.float32)
    return jnp.abs(signal - before).mean((1, 2)) / jnp.abs(before).mean((1, 2))


def run_or_skip(
    state: State, need: jax.Array, img: jax.Array, blocks: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, State]:
    """Return image tokens (B, L, D) after the blocks: `blocks(img)` if needed, else img + residual.

    The blocks are computed only if some sample needs them. Returns the state with the residuals.
    Outside of a compiled program it waits to know.
    """

    def run(img: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, chosen = blocks(img), _over(need)
        return jnp.where(chosen, out, img + residual), jnp.where(chosen, out - img, residual)

    def skip(img: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        return img + residual, residual

    if isinstance(need, jax.core.Tracer):
        out, residual = jax.lax.cond(need.any(), run, skip, img, state.residual)
    else:
        out, residual = (run if need.any() else skip)(img, state.residual)
    return out, state._replace(residual=residual)


def _over(need: jax.Array) -> jax.Array:
    """(B,) -> (B, 1, 1)."""
    return need[:, None, None]


class Control(NamedTuple):
    """Inputs of a step cache: `forced` and `threshold`, scalars."""

    forced: Array
    threshold: Array


def cached(
    network: Network,
    cfg: Any,
    params: Any,
    dtype: str,
    kind: str,
    control: Control,
) -> Pass:
    """Run the blocks of the network only for samples that need them; the memory is a `State`."""
    hooks = network.step_cache

    def run(x: jax.Array, sigma: Array, context: Any, conditions: Any, memory: State) -> Prediction:
        sigmas = jnp.full(x.shape[0], sigma)
        tokens = hooks.embed(cfg, params, x, sigmas, context, conditions, jnp.dtype(dtype))
        if kind == "tea":
            assert hooks.block_input and hooks.teacache  # `Settings.check`
            first, signal = 0, hooks.block_input(cfg, params, tokens)
            need, memory = tea(memory, signal, *control, hooks.teacache)
        else:
            first, before = 1, tokens.img
            tokens = hooks.first_block(cfg, params, tokens)
            need, memory = first_block(memory, tokens.img - before, *control)

        def blocks(img: jax.Array) -> jax.Array:
            return hooks.run_blocks(cfg, params, tokens._replace(img=img), first)

        img, memory = run_or_skip(memory, need, tokens.img, blocks)
        return Prediction(hooks.head(cfg, params, img, tokens.vec, x.shape), memory, need)

    return run


def check_fit(network: Network, kind: str) -> None:
    """Raise ValueError if the network cannot run with this kind of cache."""
    if kind == "tea" and network.step_cache.teacache is None:
        raise ValueError(
            "step cache tea: no polynomial is fitted to this network; use first-block, or no cache"
        )


def start_for(
    network: Network, cfg: Any, params: Any, x: jax.Array, context: Any, conditions: Any, dtype: str
) -> State:
    """Return the state before the first step of a section from x (B, w, H, W, C)."""
    sigma = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    # The embedding reads no parameter that the network brings to the device by itself.
    arrays = jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, params)
    tokens = _embed.eval_shape(network, cfg, dtype, arrays, x, sigma, context, conditions)
    return start(tokens.img.shape, tokens.img.dtype)


@functools.partial(jax.jit, static_argnames=("network", "cfg", "dtype"))
def _embed(
    network: Network,
    cfg: Any,
    dtype: str,
    params: Any,
    x: jax.Array,
    sigma: jax.Array,
    context: Any,
    conditions: Any,
) -> Any:
    """Used for its shapes only, which jit remembers from section to section; never run."""
    return network.step_cache.embed(cfg, params, x, sigma, context, conditions, jnp.dtype(dtype))
