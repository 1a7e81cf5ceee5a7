"""The interface of a network that predicts velocity.

Shapes: B batch, w latent window, H W latent rows and columns, C channels, L image tokens, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax


class Velocity(Protocol):
    """Predict the velocity (B, w, H, W, C), float32, of a noisy section x (B, w, H, W, C).

    `sigma` (B,) are noise levels, `context` and `conditions` what the section is made from. Blocks
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

    `embed` takes the arguments of `Velocity` and returns `EmbeddedTokens`. `block_input(cfg,
    params, tokens)` is the modulated input of the first block, from which TeaCache estimates with
    `teacache`, polynomial coefficients with the highest power first. `first_block(cfg, params,
    tokens)` returns the tokens after that block. `run_blocks(cfg, params, tokens, first)` returns
    image tokens (B, L, D) after the blocks from number `first` on, and `head(cfg, params, img,
    vec, shape)` the velocity of `shape`.
    """

    embed: Callable[..., Any]
    block_input: Callable[..., jax.Array]
    first_block: Callable[..., Any]
    run_blocks: Callable[..., jax.Array]
    head: Callable[..., jax.Array]
    teacache: tuple[float, ...]


class Network(Protocol):
    """A network as the sampler takes it; hashable, as it is a static argument of `jax.jit`."""

    @property
    def velocity(self) -> Velocity: ...

    @property
    def step_cache(self) -> StepCacheHooks: ...
