"""From noise to the latents of one section: the compiled denoising step, and the loop over it.

One program serves all steps and all sections of a bucket: what differs between them (noise level,
solver coefficients, guidance, known latents, a cache's threshold) are inputs. Only a negative
prompt and a step cache make another program.

The network is handed in (`network.Network`): its `velocity`, or the parts that a step cache calls.
Parameters that are no arrays are layers that the network brings to the device by itself
(`offload.OffloadedLayers`): its functions are called from Python then, and only what is around
them is compiled here.

Shapes: B batch, w latent window, H W latent rows and columns, C channels.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax.diffusion import cache as step_cache
from framepack_jax.diffusion import flow, guidance, solver
from framepack_jax.diffusion.network import Network
from framepack_jax.parallel.multihost import fetch, place
from framepack_jax.parallel.sharding import constrain

OnStep = Callable[[int, jax.Array], None]
Caches = tuple[step_cache.State | None, ...]
"""State of the step cache for each pass through the network; None without a cache."""


class SectionInputs(NamedTuple):
    """What a section is made from; the same at all its steps.

    `negative` are the conditions of a second pass, or None. Latents `target` (B, w, H, W, C) are
    given where `known` (B, w). `threshold` is that of the step cache, or None without one.
    """

    context: Any
    conditions: Any
    negative: Any
    target: jax.Array
    known: jax.Array
    cfg_scale: jax.Array
    cfg_rescale: jax.Array
    threshold: jax.Array | None


class At(NamedTuple):
    """One step of a schedule: noise level, row (9,) of the solver's table, and whether the blocks
    must run (None without a step cache)."""

    sigma: np.ndarray
    row: np.ndarray
    forced: np.ndarray | None


class Denoised(NamedTuple):
    """Latents (B, w, H, W, C) float32 of a section, and what happened on the way.

    `finite_step` (B,) is the first step, from 0, whose prediction was not finite for that sample,
    or -1. `blocks_run` (steps, passes, B) bool says where the blocks of the network ran for a
    sample; None without a step cache.
    """

    latents: np.ndarray
    finite_step: np.ndarray
    blocks_run: np.ndarray | None


def denoise(
    model: Network,
    cfg: Any,
    params: Any,
    noise: jax.Array,
    sigmas: np.ndarray,
    table: np.ndarray,
    context: Any,
    conditions: Any,
    negative: Any = None,
    *,
    target: np.ndarray | None = None,
    known: np.ndarray | None = None,
    cfg_scale: float = 1.0,
    cfg_rescale: float = 0.0,
    dtype: str = "float32",
    cache: step_cache.StepCacheConfig | None = None,
    on_step: OnStep | None = None,
) -> Denoised:
    """Run all steps of one section from noise (B, w, H, W, C).

    `sigmas` (steps + 1,) and the solver's `table` (steps, 9) are on the host. Latents that are
    already there come as `target` (B, w, H, W, C) with `known`, (w,) or (B, w) bool: the result
    holds them unchanged, and the others are made to go with them. `negative`, where given, makes a
    second pass that `cfg_scale` and `cfg_rescale` weigh (`guidance.guide`). With dtype float32,
    matrix products are float32 too.

    `on_step(step, x0)` is called after each step with the prediction x0 (B, w, H, W, C), on the
    device. If a step is one program, the next one is started before, so that the device always has
    work at hand; a step of streamed layers has ended by then. Nothing else waits for the device
    before the end, so that a sample which is not finite does not stop the others: see
    `finite_step`. Raises ValueError where shapes of target and known, or sigmas and table, do not
    go together.
    """
    target, known = _known(target, known, noise.shape)
    if len(sigmas) != len(table) + 1:
        raise ValueError(
            f"{len(sigmas)} sigmas and {len(table)} rows of coefficients: expected one sigma more"
        )
    inputs = SectionInputs(
        context,
        conditions,
        negative,
        target,
        known,
        np.float32(cfg_scale),
        np.float32(cfg_rescale),
        None if cache is None else np.float32(cache.threshold),
    )
    # Once: what stays on the host is copied at every step. Between programs of streamed layers
    # arrays are bound to their device, and so are those of the first step.
    compiled = _is_compiled(params)
    put = functools.partial(place, bound=not compiled)
    inputs = put(inputs)
    fixed = model, cfg, dtype, None if cache is None else cache.kind
    advance = step if compiled else _step
    state = put(solver.start(noise))
    cached = put(start_caches(*fixed, params, inputs, state.x))
    finite, ran = [], []

    def show(step: int, x0: jax.Array) -> None:
        if on_step is not None:
            on_step(step, fetch(x0).block_until_ready())

    for i, at in enumerate(_steps(sigmas, table, cache)):
        before = state.history[0]
        state, cached, ok, blocks = advance(*fixed, params, inputs, at, state, cached)
        finite.append(ok)
        ran.append(blocks)
        if not compiled:
            show(i, state.history[0])
        elif i > 0:
            show(i - 1, before)
    if compiled:
        show(len(finite) - 1, state.history[0])
    latents, finite, ran = jax.device_get(fetch((state.x, finite, ran)))
    bad = ~np.stack(finite)
    finite_step = np.where(bad.any(axis=0), bad.argmax(axis=0), -1)
    return Denoised(latents, finite_step, None if cache is None else np.stack(ran))


def _known(
    target: np.ndarray | None, known: np.ndarray | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Known latents (B, w, H, W, C) and where they are known (B, w), for noise of that shape."""
    if target is None and known is None:
        return np.zeros(shape, np.float32), np.zeros(shape[:2], bool)
    if target is None or known is None:
        raise ValueError("known latents: give both target and known, or neither")
    if np.shape(target) != shape or np.shape(known) not in (shape[1:2], shape[:2]):
        raise ValueError(
            f"known latents: target {np.shape(target)} and known {np.shape(known)} do not fit noise"
            f" {shape}; expected its shape, and its first axes {shape[1:2]} or {shape[:2]}"
        )
    return np.asarray(target, np.float32), np.broadcast_to(np.asarray(known, bool), shape[:2])


def _steps(
    sigmas: np.ndarray, table: np.ndarray, cache: step_cache.StepCacheConfig | None
) -> list[At]:
    sigmas, table = np.asarray(sigmas, np.float32), np.asarray(table, np.float32)
    forced = [None] * len(table) if cache is None else step_cache.forced(cache.kind, len(table))
    return [At(*at) for at in zip(sigmas[:-1], table, forced, strict=True)]


def _step(
    model: Network,
    cfg: Any,
    dtype: str,
    kind: str | None,
    params: Any,
    inputs: SectionInputs,
    at: At,
    state: solver.State,
    cached: Caches,
) -> tuple[solver.State, Caches, jax.Array, jax.Array | None]:
    """One denoising step: (state, cached, whether the prediction is finite (B,), blocks run).

    `kind` is that of the step cache, or None; blocks run is (passes, B) bool, or None without one.
    The arrays of `cached` are used up; those of `state` are not, as `on_step` may still hold them.
    """
    with precision(dtype):
        done = [
            _predict(model, cfg, dtype, kind, params, inputs, at, state.x, conditions, before)
            for conditions, before in zip(_passes(inputs), cached, strict=True)
        ]
        velocities, cached, ran = zip(*done, strict=True)
        # Whole on every device, as they came, so that the next step finds the same program.
        state, finite = _advance(velocities, inputs, at, state)
    cached = jax.tree.map(_whole, cached)
    return state, cached, finite, None if kind is None else jnp.stack(ran)


step = jax.jit(_step, static_argnames=("model", "cfg", "dtype", "kind"), donate_argnames="cached")


@jax.jit
def _advance(
    velocities: tuple[jax.Array, ...], inputs: SectionInputs, at: At, state: solver.State
) -> tuple[solver.State, jax.Array]:
    """What the predicted velocities make of a state, and whether they are finite (B,)."""
    v = velocities[0]
    if inputs.negative is not None:
        v = guidance.guide(*velocities, inputs.cfg_scale, inputs.cfg_rescale)
    x0 = flow.x0_from_velocity(state.x, v, at.sigma)
    # A prediction that never changes keeps the state on the straight path to it, exactly where the
    # network expects a frame that is to become the target.
    x0 = jnp.where(inputs.known[:, :, None, None, None], inputs.target, x0)
    finite = jnp.isfinite(x0).all(axis=tuple(range(1, x0.ndim)))
    return jax.tree.map(_whole, solver.step(state, x0, at.row)), finite


def _is_compiled(params: Any) -> bool:
    """Whether a step is one program."""
    return not any(map(_is_streamed, jax.tree.leaves(params)))


def _is_streamed(leaf: Any) -> bool:
    return hasattr(leaf, "layers")


def _whole(x: jax.Array) -> jax.Array:
    return constrain(x, *(None,) * x.ndim)


def _passes(inputs: SectionInputs) -> list[Any]:
    """Conditions of each pass through the network."""
    return [c for c in (inputs.conditions, inputs.negative) if c is not None]


def _predict(
    model: Network,
    cfg: Any,
    dtype: str,
    kind: str | None,
    params: Any,
    inputs: SectionInputs,
    at: At,
    x: jax.Array,
    conditions: Any,
    cached: step_cache.State | None,
) -> tuple[jax.Array, step_cache.State | None, jax.Array | None]:
    """One pass through the network: (velocity, cache, who needed the blocks (B,))."""
    args = x, jnp.full(x.shape[0], at.sigma), inputs.context, conditions, jnp.dtype(dtype)
    if kind is None:
        return model.velocity(cfg, params, *args), None, None
    hooks = model.step_cache
    tokens = hooks.embed(cfg, params, *args)
    if kind == "tea":
        first, signal = 0, hooks.block_input(cfg, params, tokens)
        need, cached = step_cache.tea(cached, signal, at.forced, inputs.threshold, hooks.teacache)
    else:
        first, before = 1, tokens.img
        tokens = hooks.first_block(cfg, params, tokens)
        need, cached = step_cache.first_block(
            cached, tokens.img - before, at.forced, inputs.threshold
        )

    def blocks(img: jax.Array) -> jax.Array:
        return hooks.run_blocks(cfg, params, tokens._replace(img=img), first)

    img, cached = step_cache.run_or_skip(cached, need, tokens.img, blocks)
    return hooks.head(cfg, params, img, tokens.vec, x.shape), cached, need


def start_caches(
    model: Network,
    cfg: Any,
    dtype: str,
    kind: str | None,
    params: Any,
    inputs: SectionInputs,
    x: jax.Array,
) -> Caches:
    """What `step` takes at the first step of a section from x (B, w, H, W, C)."""
    if kind is None:
        return (None,) * len(_passes(inputs))
    sigma = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    here = jax.tree.map(lambda leaf: None if _is_streamed(leaf) else leaf, params)
    img = [
        _embed.eval_shape(model, cfg, dtype, here, x, sigma, inputs.context, conditions).img
        for conditions in _passes(inputs)
    ]
    return tuple(step_cache.start(tokens.shape, tokens.dtype) for tokens in img)


@functools.partial(jax.jit, static_argnames=("model", "cfg", "dtype"))
def _embed(
    model: Network,
    cfg: Any,
    dtype: str,
    params: Any,
    x: jax.Array,
    sigma: jax.Array,
    context: Any,
    conditions: Any,
) -> Any:
    """For the shapes alone, which jit remembers from section to section; never run."""
    return model.step_cache.embed(cfg, params, x, sigma, context, conditions, jnp.dtype(dtype))


def precision(dtype: str) -> contextlib.AbstractContextManager:
    """float32 means float32: devices multiply float32 matrices in fewer bits unless told."""
    if dtype == "float32":
        return jax.default_matmul_precision("float32")
    return contextlib.nullcontext()
