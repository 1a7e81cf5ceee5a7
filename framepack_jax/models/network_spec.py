"""Interface of a kind of network to the rest of the package.

A spec is a frozen dataclass of one family's functions and tables; `registry.NETWORKS` holds one for
each kind. Specs are compared by identity, so that they can be static arguments of `jax.jit`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from framepack_jax.diffusion.network import StepCacheHooks, Velocity
from framepack_jax.models.params import Params
from framepack_jax.packing import Schedule
from framepack_jax.parallel import sharding

Config = Any
"""Frozen dataclass of all sizes that decide the shapes of a network's parameters."""
Preview = tuple[np.ndarray, np.ndarray]
"""Weights (C, 3) and bias (3,) from latents to colours in [-1, 1]."""
LatentStatistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each latent channel."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class NetworkSpec:
    """A kind of network.

    `init(cfg, key)` returns random parameters, the layers of a stack on a leading axis. `stacks`
    maps the top-level name of each stack to the config field with its number of layers;
    `offloadable` names the stacks that may be an `OffloadedLayers`. `sharding_rules` are those of
    `sharding.resolve`.
    """

    kind: str
    config: type
    init: Callable[[Config, jax.Array], Params]
    sharding_rules: sharding.Rules
    stacks: Mapping[str, str]
    offloadable: tuple[str, ...] = ()

    def abstract_params(self, cfg: Config) -> Params:
        """Return the shape and dtype of every parameter without computing any."""
        return jax.tree.map(lambda leaf: leaf, _abstract_params(self, cfg))


# Tracing a network takes up to a second, and a command asks several times.
@functools.cache
def _abstract_params(spec: NetworkSpec, cfg: Config) -> Params:
    # The key is made inside, so that no accelerator is started.
    return jax.eval_shape(lambda: spec.init(cfg, jax.random.key(0)))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TextEncoderSpec(NetworkSpec):
    """A text encoder that gives a state for each token of a prompt.

    `hidden_states(cfg, params, ids, valid)` returns the states (B, L, D) of token ids (B, L);
    `hidden_states_of_each(cfg, params, inputs)` those of several (ids, valid), and copies each
    offloaded layer once. `clean` prepares a prompt for the tokenizer.
    """

    hidden_states: Callable[..., jax.Array]
    hidden_states_of_each: Callable[..., list[jax.Array]]
    clean: Callable[[str], str] = str


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DenoiserSpec(NetworkSpec):
    """A network that predicts the velocity of a noisy section from packed context.

    `encoders(cfg)` are the roles of the networks whose states are its conditions. `conditions(text,
    valid, pooled, image, guidance)` makes them of `conditioning.PromptStates`, image tokens and the
    scale of distilled guidance; without an encoder for them, `pooled` and `image` are None.
    With `reads_padding`, a prompt is read with its padding, so that the number of tokens matters.
    `patch` is the kernel that patchifies the target. `context_kernels(schedule)` names the patch
    embeddings that a schedule needs; `check_kernels(cfg, kernels)` and `check_mesh(cfg, mesh)`
    raise ValueError if the network has none for a kernel, or cannot be divided over a mesh.
    `forward_flops(cfg, schedule, rows, columns, text, image)` counts the matrix products of one
    sample. `offload_programs` lists what a step compiles if blocks are offloaded. `lora_targets` is
    a regular expression of the linear layers, as "blocks/qkv", that a LoRA adapts by default.
    """

    velocity: Velocity
    step_cache: StepCacheHooks
    encoders: Callable[[Config], tuple[str, ...]]
    conditions: Callable[..., Any]
    patch: str
    context_kernels: Callable[[Schedule], tuple[str, ...]]
    check_kernels: Callable[[Config, Iterable[str]], None]
    check_mesh: Callable[..., None]
    forward_flops: Callable[..., int]
    offload_programs: Callable[..., list[Any]]
    lora_targets: str
    reads_padding: bool = False


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VaeSpec(NetworkSpec):
    """A video autoencoder.

    Its config tells `space_compression`, `time_compression`, `in_channels` and `latent_channels`.
    The first latent frame stands for one frame, every other for `time_compression` frames.

    `encode(cfg, params, video, tiling)` returns mean and log variance of the latents, `decode(cfg,
    params, latents, tiling)` the video; `check_tiling(cfg, tiling)` raises ValueError if the
    network cannot take such tiles. Latents are not normalised: a bundle holds mean and standard
    deviation of each channel (`autoencoder.normalise`); `latent_statistics(cfg)` gives those of
    the released network, None if none has such latents. `fit(cfg, params, clips)` returns first
    parameters that suit clips (B, T, H, W, C) in [-1, 1], if the network has any. `preview` are
    weights (C, 3) and bias (3,) from normalised latents to colours in [-1, 1]; or a function of
    (cfg, params) that gives those from latents that are not normalised.

    If `exact_chunks`, a clip that is computed in chunks of time (`Tiling.frames` is not None) gives
    the numbers of the clip computed at once, in memory that does not grow with its length; else
    `Tiling.frames` sets temporal tiles, which are cross-faded.
    """

    encode: Callable[..., tuple[jax.Array, jax.Array]]
    decode: Callable[..., jax.Array]
    check_tiling: Callable[..., None]
    latent_statistics: Callable[[Config], LatentStatistics | None]
    preview: Preview | Callable[[Config, Params], Preview]
    exact_chunks: bool = False
    fit: Callable[..., Params] | None = None
