"""Wan 2.1's causal 3-D autoencoder: video <-> latents.

The first latent frame stands for one frame of video, every other for `time_compression` frames. A
clip is computed chunk by chunk, in memory that does not grow with its length, or at once if
`Tiling.frames` is None; both give the same numbers. `Tiling.frames` and `frame_stride` mean
nothing else here. Spatial tiles are those of diffusers' `AutoencoderKLWan`.

Source: Wan (arXiv 2503.20314, section 4.1).

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from framepack_jax.models.autoencoder import ROWS, check_clip, draw_params, split_moments
from framepack_jax.models.network_spec import LatentStatistics
from framepack_jax.models.params import Params, apply_module
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.tiling import (
    DEFAULT_TILING,
    TileAxis,
    Tiling,
    apply_tiled,
    narrow_squares,
)
from framepack_jax.models.wan.vae_blocks import CACHE, Decoder, Encoder
from framepack_jax.models.wan.vae_config import RELEASED_MEAN, RELEASED_STD, WanVaeConfig
from framepack_jax.parallel.sharding import BATCH, constrain

STACKS: dict[str, str] = {}


def init(cfg: WanVaeConfig, key: jax.Array) -> Params:
    """Draw parameters {"encoder": ..., "decoder": ...}; kernels are scaled by their inputs."""
    side = cfg.space_compression
    video = jnp.zeros((1, 1 + cfg.time_compression, side, side, cfg.in_channels))
    latents = jnp.zeros((1, 2, 1, 1, cfg.latent_channels))

    def shapes(module: nn.Module, x: jax.Array) -> Params:
        return jax.eval_shape(functools.partial(module.init, first=True), key, x)["params"]

    halves = {"encoder": shapes(Encoder(cfg), video), "decoder": shapes(Decoder(cfg), latents)}
    return draw_params(halves, key)


def encode(
    cfg: WanVaeConfig, params: Params, video: jax.Array, tiling: Tiling = DEFAULT_TILING
) -> tuple[jax.Array, jax.Array]:
    """Encode video (B, T, H, W, C) in [-1, 1]: mean and log variance of its latents, not
    normalised.

    Both are (B, 1 + (T - 1) // time_compression, H / space_compression, W / space_compression,
    latent_channels) in the video's dtype; the mean is the mode. Frames beyond the last whole chunk
    are not read. Raises ValueError if H, W or the tiles are no multiples of the compression.
    """
    check_clip("video", video, cfg.in_channels, cfg.space_compression)
    video = video[:, : 1 + (video.shape[1] - 1) // cfg.time_compression * cfg.time_compression]
    network = functools.partial(_encode, cfg, tiling.frames is not None, params["encoder"])
    return split_moments(apply_tiled(network, video, None, _squares(cfg, tiling)))


def decode(
    cfg: WanVaeConfig, params: Params, latents: jax.Array, tiling: Tiling = DEFAULT_TILING
) -> jax.Array:
    """Decode latents (B, T, H, W, C), not normalised, to video.

    The video (B, 1 + (T - 1) time_compression, H space_compression, W space_compression,
    out_channels) is clamped to [-1, 1], in the latents' dtype. Raises ValueError if the tiles are
    no multiples of the compression.
    """
    check_clip("latents", latents, cfg.latent_channels, 1)
    space = _squares(cfg, tiling)
    network = functools.partial(_decode, cfg, tiling.frames is not None, params["decoder"])
    return _clamp(apply_tiled(network, latents, None, space and space.swapped()))


def check_tiling(cfg: WanVaeConfig, tiling: Tiling) -> None:
    """Raise ValueError if the tiles are no multiples of the compression."""
    _squares(cfg, tiling)


def latent_statistics(cfg: WanVaeConfig) -> LatentStatistics | None:
    """Return mean and standard deviation of each latent channel of the released network, None for
    another number of channels."""
    known = cfg.latent_channels == len(RELEASED_MEAN)
    return (RELEASED_MEAN, RELEASED_STD) if known else None


def _squares(cfg: WanVaeConfig, tiling: Tiling) -> TileAxis | None:
    return narrow_squares(tiling, cfg.time_compression, cfg.space_compression)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(cfg: WanVaeConfig, chunked: bool, params: Params, video: jax.Array) -> jax.Array:
    size = cfg.time_compression if chunked else None
    return _apply(Encoder(cfg), params, video, size)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(cfg: WanVaeConfig, chunked: bool, params: Params, latents: jax.Array) -> jax.Array:
    return _apply(Decoder(cfg), params, latents, 1 if chunked else None)


@functools.partial(jax.jit, donate_argnums=0)
def _clamp(video: jax.Array) -> jax.Array:
    return jnp.clip(video, -1, 1)


def _apply(module: nn.Module, params: Params, x: jax.Array, size: int | None) -> jax.Array:
    """Compute a half of the network on a clip, `size` frames at a time, or at once."""
    params = cast_params(params, x.dtype)
    x = constrain(x, BATCH, None, ROWS, None, None)
    if size is None:
        y = apply_module(module, params, x, True)
    else:
        y = _by_chunks(module, params, x, size)
    return constrain(y, BATCH, None, ROWS, None, None)


def _by_chunks(module: nn.Module, params: Params, x: jax.Array, size: int) -> jax.Array:
    """Compute the first frame alone, then `size` frames at a time.

    The features that a chunk leaves to the next are the carry of one loop, whose program does not
    depend on the length; its results are written in place.
    """

    def compute(chunk: jax.Array, cache: Params | None) -> tuple[jax.Array, Params]:
        variables = {"params": params} | ({} if cache is None else {CACHE: cache})
        y, left = module.apply(variables, chunk, first=cache is None, mutable=[CACHE])
        return y, left[CACHE]

    def step(carry: tuple[jax.Array, Params], number: jax.Array) -> tuple[Any, None]:
        out, cache = carry
        chunk = jax.lax.dynamic_slice_in_dim(x, 1 + size * number, size, axis=1)
        y, cache = compute(chunk, cache)
        at = 1 + y.shape[1] * number
        return (jax.lax.dynamic_update_slice_in_dim(out, y, at, axis=1), cache), None

    head, cache = compute(x[:, :1], None)
    count = (x.shape[1] - 1) // size
    if not count:
        return head
    frames = jax.eval_shape(compute, x[:, 1 : 1 + size], cache)[0].shape[1]
    out = jnp.zeros((head.shape[0], 1 + count * frames, *head.shape[2:]), head.dtype)
    (out, _), _ = jax.lax.scan(step, (out.at[:, :1].set(head), cache), jnp.arange(count))
    return out
