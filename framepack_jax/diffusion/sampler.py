"""From noise to the latents of one section: the compiled denoising step, and the loop over it.

    x0 = denoiser(x, sigma)
    state = solver.step(state, x0, row)

The denoiser is the network inside wrappers: a step cache, guidance, given frames. One program
serves all steps and all sections of a bucket: noise level, solver coefficients, guidance, given
latents and the threshold of a cache are inputs. Only a negative prompt and a step cache make
another program.

Parameters that are no arrays are layers that the network brings to the device by itself. Its
functions are then called from Python, and only the code around them is compiled here.

Shapes: B batch, w latent window, H W latent rows and columns, C channels.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax.diffusion import given_frames, guidance, network, solver, step_cache
from framepack_jax.diffusion.given_frames import GivenFrames
from framepack_jax.diffusion.history_noise import HistoryNoise, noise_history
from framepack_jax.diffusion.network import Array, Denoiser, Network
from framepack_jax.parallel.multihost import fetch, place
from framepack_jax.parallel.sharding import constrain

OnStep = Callable[[int, jax.Array], None]
Memory = tuple[step_cache.State | None, ...]
"""State of the step cache for each pass through the network; None without a cache."""


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """Static arguments of a step: the network, its dtype, the kind of step cache."""

    network: Network
    cfg: Any
    dtype: str = "float32"
    cache: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerSettings:
    """Settings of a section's denoising.

    Args:
        sigmas: noise levels (steps + 1,), falling to 0.
        table: coefficients (steps, 9) of the solver.
        cfg_scale, cfg_rescale: see `guidance.guide`; used if there are negative conditions.
        dtype: that of the blocks. With float32, matrix products are float32 too.
        cache: step cache, or None.
        times: noise levels (steps,) that the network is told, if not sigmas.
        still: (steps,) True where guidance sets the velocity to zero, with CFG-Zero* at the other
            steps; None for plain guidance.

    Raises ValueError if the numbers of sigmas and rows do not fit.
    """

    sigmas: np.ndarray
    table: np.ndarray
    cfg_scale: float = 1.0
    cfg_rescale: float = 0.0
    dtype: str = "float32"
    cache: step_cache.StepCacheConfig | None = None
    times: np.ndarray | None = None
    still: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.table) + 1:
            raise ValueError(
                f"{len(self.sigmas)} sigmas and {len(self.table)} rows of coefficients: expected"
                " one sigma more"
            )


class SectionInputs(NamedTuple):
    """Inputs that all steps of a section share.

    `negative` are the conditions of a second pass, or None; `negative_context` is its context, None
    for the same. `threshold` is that of the step cache, or None. `noise` is that of the history of
    `context`, or None.
    """

    context: Any
    conditions: Any
    negative: Any
    given: GivenFrames
    cfg_scale: Array
    cfg_rescale: Array
    threshold: Array | None
    negative_context: Any = None
    noise: HistoryNoise | None = None

    @property
    def passes(self) -> list[tuple[Any, Any]]:
        """Context and conditions of each pass through the network."""
        first = self.context, self.conditions
        if self.negative is None:
            return [first]
        other = self.context if self.negative_context is None else self.negative_context
        return [first, (other, self.negative)]


class At(NamedTuple):
    """Inputs of one step: noise level, row of the solver's table, whether the blocks must run (None
    without a step cache), noise level that the network is told (None for the same), and whether the
    velocity is zero (None without CFG-Zero*)."""

    sigma: np.ndarray
    row: np.ndarray
    forced: np.ndarray | None
    time: np.ndarray | None = None
    still: np.ndarray | None = None


class Denoised(NamedTuple):
    """Latents (B, w, H, W, C) float32 of a section, and a report of its steps.

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
    noise: jax.Array | np.ndarray,
    settings: SamplerSettings,
    context: Any,
    conditions: Any,
    negative: Any = None,
    negative_context: Any = None,
    *,
    given: GivenFrames | None = None,
    history_noise: HistoryNoise | None = None,
    on_step: OnStep | None = None,
) -> Denoised:
    """Run all steps of one section from noise (B, w, H, W, C).

    The result holds `given` latents unchanged; the others are made to go with them. `negative`
    conditions make a second pass for classifier-free guidance, which reads `negative_context` if it
    is given. The history of `context` gets the `history_noise` of each step.

    `on_step(step, x0)` is called after each step with the prediction x0 (B, w, H, W, C), on the
    device. If a step is one program, the next step starts before the call, so that the device
    always has work; a step of offloaded layers has ended by then. Nothing else waits for the device
    before the end, so a sample that is not finite does not stop the others: see `finite_step`.

    Raises ValueError if the shapes of noise and given latents do not fit.
    """
    given = given_frames.checked(given, noise.shape)
    cache = settings.cache
    inputs = SectionInputs(
        context, conditions, negative, given,
        np.float32(settings.cfg_scale), np.float32(settings.cfg_rescale),
        None if cache is None else np.float32(cache.threshold), negative_context, history_noise,
    )  # fmt: skip
    program = StepProgram(model, cfg, settings.dtype, None if cache is None else cache.kind)
    # Once: what stays on the host is copied at every step. Between programs of offloaded layers
    # arrays are bound to their device, and so are those of the first step.
    compiled = is_compiled(params)
    put = functools.partial(place, bound=not compiled)
    inputs = put(inputs)
    again = settings.table.shape[1] > solver.COLUMNS
    state = put(solver.start(cast(jax.Array, noise), again))
    memory = put(start_memory(program, params, inputs, state.x))
    advance = step if compiled else _step
    reports, show = [], _Delayed(on_step, int(compiled))
    for at in _steps(settings):
        state, memory, *report = advance(program, params, inputs, at, state, memory)
        reports.append(report)
        show.add(state.history[0])
    show.finish()
    latents, reports = jax.device_get(fetch((state.x, reports)))
    finite, ran = zip(*reports, strict=True)
    bad = ~np.stack(finite)
    finite_step = np.where(bad.any(axis=0), bad.argmax(axis=0), -1)
    return Denoised(latents, finite_step, None if cache is None else np.stack(ran))


class _Delayed:
    """Calls `on_step` with each prediction, when `delay` more of them have been added."""

    def __init__(self, on_step: OnStep | None, delay: int) -> None:
        self._on_step, self._delay = on_step, delay
        self._waiting: list[jax.Array] = []
        self._shown = 0

    def add(self, x0: jax.Array) -> None:
        self._waiting.append(x0)
        if len(self._waiting) > self._delay:
            self._show()

    def finish(self) -> None:
        while self._waiting:
            self._show()

    def _show(self) -> None:
        x0 = self._waiting.pop(0)
        if self._on_step is not None:
            self._on_step(self._shown, fetch(x0).block_until_ready())
        self._shown += 1


def _steps(settings: SamplerSettings) -> list[At]:
    sigmas = np.asarray(settings.sigmas, np.float32)
    table = np.asarray(settings.table, np.float32)
    cache = settings.cache
    none = [None] * len(table)
    forced = none if cache is None else step_cache.forced(cache.kind, len(table))
    times = none if settings.times is None else np.asarray(settings.times, np.float32)
    still = none if settings.still is None else np.asarray(settings.still, bool)
    return [At(*at) for at in zip(sigmas[:-1], table, forced, times, still, strict=True)]


def make_denoiser(program: StepProgram, params: Any, inputs: SectionInputs, at: At) -> Denoiser:
    """Wrap the network: its step cache, then guidance, then given frames."""
    if inputs.noise is not None:
        level = at.sigma if at.time is None else at.time
        inputs = inputs._replace(context=noise_history(inputs.context, inputs.noise, level))
    fixed = program.network, program.cfg, params, program.dtype
    if program.cache is None:
        run = network.uncached(*fixed)
    else:
        assert at.forced is not None and inputs.threshold is not None, "inputs of a step cache"
        control = step_cache.Control(at.forced, inputs.threshold)
        run = step_cache.cached(*fixed, program.cache, control)
    denoiser = guidance.guided(
        run, inputs.passes, inputs.cfg_scale, inputs.cfg_rescale, at.time, at.still
    )
    return given_frames.keep(denoiser, inputs.given)


def _step(
    program: StepProgram,
    params: Any,
    inputs: SectionInputs,
    at: At,
    state: solver.State,
    memory: Memory,
) -> tuple[solver.State, Memory, jax.Array, jax.Array | None]:
    """Run one denoising step.

    Returns (state, memory, whether the prediction is finite (B,), blocks run (passes, B) or None).
    The arrays of `memory` are donated; those of `state` are not, as `on_step` may still hold them.
    """
    with precision(program.dtype):
        denoiser = make_denoiser(program, params, inputs, at)
        x0, memory, ran = denoiser(state.x, at.sigma, memory)
        state, finite = _advance(state, x0, at.row)
    return state, jax.tree.map(_replicated, memory), finite, ran


step = jax.jit(_step, static_argnames="program", donate_argnames="memory")


@jax.jit
def _advance(state: solver.State, x0: jax.Array, row: jax.Array) -> tuple[solver.State, jax.Array]:
    """Return the next state, and whether the prediction of each sample is finite (B,)."""
    finite = jnp.isfinite(x0).all(axis=tuple(range(1, x0.ndim)))
    # Replicated as it came, so that the next step finds the same program.
    return jax.tree.map(_replicated, solver.step(state, x0, row)), finite


def is_compiled(params: Any) -> bool:
    """Return True if a step is one program: all parameters are arrays."""
    return all(map(network.is_array, jax.tree.leaves(params)))


def _replicated(x: jax.Array) -> jax.Array:
    return constrain(x, *(None,) * x.ndim)


def start_memory(program: StepProgram, params: Any, inputs: SectionInputs, x: jax.Array) -> Memory:
    """Return the memory of `step` before the first step of a section from x (B, w, H, W, C)."""
    if program.cache is None:
        return (None,) * len(inputs.passes)
    model = program.network, program.cfg, params
    return tuple(step_cache.start_for(*model, x, *each, program.dtype) for each in inputs.passes)


def precision(dtype: str) -> contextlib.AbstractContextManager[None]:
    """Multiply float32 matrices in full float32, where devices use fewer bits by default."""
    if dtype == "float32":
        return jax.default_matmul_precision("float32")
    return contextlib.nullcontext()
