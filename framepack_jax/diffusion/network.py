"""The interfaces of a network that predicts velocity, and of a denoiser around it.

Shapes: B batch, w latent window, H W latent rows and columns, C channels, L image tokens, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray | np.floating
"""An input of a compiled program, on the device or still on the host."""


class Velocity(Protocol):
    """Predict the velocity (B, w, H, W, C), float32, of a noisy section x (B, w, H, W, C).

    `sigma` (B,) are noise levels; `context` and `conditions` are inputs of the section. Blocks
    compute in `dtype`; `remat` names what their gradient keeps.
    """

    def __call__(
        self,
        cfg: Any,
        params: Any,
        x: jax.Array,
        sigma: jax.Array,
        context: Any,
        conditions: Any,
        dtype: Any = ...,
        remat: str = ...,
    ) -> jax.Array: ...


class EmbeddedTokens(Protocol):
    """Input of the transformer blocks: at least image tokens `img` (B, L, D) and `vec` (B, D)."""

    img: jax.Array
    vec: jax.Array

    def _replace(self, *, img: jax.Array) -> "EmbeddedTokens": ...


@dataclasses.dataclass(frozen=True, eq=False)
class StepCacheHooks:
    """Parts of a forward pass that a step cache calls one by one.

    `embed` takes the arguments of `Velocity` and returns `EmbeddedTokens`. `first_block(cfg,
    params, tokens)` returns the tokens after that block. `run_blocks(cfg, params, tokens, first)`
    returns image tokens (B, L, D) after the blocks from number `first` on, and `head(cfg, params,
    img, vec, shape)` the velocity of `shape`. `block_input(cfg, params, tokens)` is the modulated
    input of the first block, from which TeaCache estimates with `teacache`, polynomial coefficients
    with the highest power first; both are None if no polynomial is fitted to the network.
    """

    embed: Callable[..., Any]
    first_block: Callable[..., Any]
    run_blocks: Callable[..., jax.Array]
    head: Callable[..., jax.Array]
    block_input: Callable[..., jax.Array] | None = None
    teacache: tuple[float, ...] | None = None


class Network(Protocol):
    """A network as the sampler takes it; hashable, as it is a static argument of `jax.jit`."""

    @property
    def velocity(self) -> Velocity: ...

    @property
    def step_cache(self) -> StepCacheHooks: ...


class Prediction(NamedTuple):
    """Output of a denoiser: `x0` (B, w, H, W, C), the clean section, or of one pass its velocity.

    `memory` is what the denoiser reads at the next step. `blocks_run` says for which samples the
    transformer blocks ran; None without a step cache.
    """

    x0: jax.Array
    memory: Any
    blocks_run: jax.Array | None


class Denoiser(Protocol):
    """Predict the clean section of a noisy one, x (B, w, H, W, C), at the noise level `sigma`.

    A denoiser is composed of wrappers, each of which calls the wrapper inside it:
    `given_frames.keep(guidance.guided(step_cache.cached(network)))`.
    """

    def __call__(self, x: jax.Array, sigma: Array, memory: Any) -> Prediction: ...


class Pass(Protocol):
    """Predict the velocity of a noisy section, given its context and one set of conditions."""

    def __call__(
        self, x: jax.Array, sigma: Array, context: Any, conditions: Any, memory: Any
    ) -> Prediction: ...


def is_array(leaf: Any) -> bool:
    """Return False for parameters that the network itself brings to the device."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def uncached(network: Network, cfg: Any, params: Any, dtype: str) -> Pass:
    """Run the whole network at every step."""

    def run(x: jax.Array, sigma: Array, context: Any, conditions: Any, memory: Any) -> Prediction:
        sigmas = jnp.full(x.shape[0], sigma)
        v = network.velocity(cfg, params, x, sigmas, context, conditions, jnp.dtype(dtype))
        return Prediction(v, memory, None)

    return run
