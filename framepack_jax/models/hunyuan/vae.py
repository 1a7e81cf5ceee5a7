"""HunyuanVideo's causal 3-D variational autoencoder: video <-> latents.

Source: HunyuanVideo (arXiv 2412.03603, section 4.1). The first latent frame stands for one frame of
video, every other for `time_compression` frames. Group norms average over the whole clip, so a clip
computed in tiles differs from one computed at once.

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

import functools

import jax
import jax.numpy as jnp

from framepack_jax.models.autoencoder import ROWS, check_clip, draw_params, split_moments
from framepack_jax.models.hunyuan.config import VaeConfig
from framepack_jax.models.hunyuan.vae_blocks import Decoder, Encoder
from framepack_jax.models.network_spec import LatentStatistics
from framepack_jax.models.params import Params, apply_module
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.tiling import DEFAULT_TILING, Tiling, apply_tiled, encoder_axes
from framepack_jax.parallel.sharding import BATCH, constrain

STACKS: dict[str, str] = {}
SCALING_FACTOR = 0.476986


def init(cfg: VaeConfig, key: jax.Array) -> Params:
    """Draw parameters {"encoder": ..., "decoder": ...}; kernels are scaled by their inputs."""
    side = cfg.space_compression
    video = jnp.zeros((1, 1, side, side, cfg.in_channels))
    latents = jnp.zeros((1, 1, 1, 1, cfg.latent_channels))
    shapes = {
        "encoder": jax.eval_shape(Encoder(cfg).init, key, video)["params"],
        "decoder": jax.eval_shape(Decoder(cfg).init, key, latents)["params"],
    }
    return draw_params(shapes, key)


def encode(
    cfg: VaeConfig, params: Params, video: jax.Array, tiling: Tiling = DEFAULT_TILING
) -> tuple[jax.Array, jax.Array]:
    """Encode video (B, T, H, W, C) in [-1, 1]: mean and log variance of its latents, not scaled.

    Both are (B, 1 + (T - 1) // time_compression, H / space_compression, W / space_compression,
    latent_channels) in the video's dtype; the mean is the mode. Raises ValueError if H, W or the
    tiles are no multiples of the compression.
    """
    check_clip("video", video, cfg.in_channels, cfg.space_compression)
    time, space = encoder_axes(tiling, cfg.time_compression, cfg.space_compression)
    moments = apply_tiled(functools.partial(_encode, cfg, params["encoder"]), video, time, space)
    return split_moments(moments)


def decode(
    cfg: VaeConfig, params: Params, latents: jax.Array, tiling: Tiling = DEFAULT_TILING
) -> jax.Array:
    """Decode latents (B, T, H, W, C), not scaled, to video.

    The video (B, 1 + (T - 1) time_compression, H space_compression, W space_compression,
    out_channels) is in about [-1, 1], not clipped, in the latents' dtype. Raises ValueError if the
    tiles are no multiples of the compression.
    """
    check_clip("latents", latents, cfg.latent_channels, 1)
    axes = encoder_axes(tiling, cfg.time_compression, cfg.space_compression)
    time, space = (axis and axis.swapped() for axis in axes)
    return apply_tiled(functools.partial(_decode, cfg, params["decoder"]), latents, time, space)


def check_tiling(cfg: VaeConfig, tiling: Tiling) -> None:
    """Raise ValueError if the tiles are no multiples of the compression."""
    encoder_axes(tiling, cfg.time_compression, cfg.space_compression)


def latent_statistics(cfg: VaeConfig) -> LatentStatistics:
    """Return mean and standard deviation of each latent channel, by the released scaling factor."""
    return (0.0,) * cfg.latent_channels, (1 / SCALING_FACTOR,) * cfg.latent_channels


# Compiled once for each shape of tile; even a long video has few.
@functools.partial(jax.jit, static_argnames="cfg")
def _encode(cfg: VaeConfig, params: Params, video: jax.Array) -> jax.Array:
    params = cast_params(params, video.dtype)
    return apply_module(Encoder(cfg), params, constrain(video, BATCH, None, ROWS, None, None))


@functools.partial(jax.jit, static_argnames="cfg")
def _decode(cfg: VaeConfig, params: Params, latents: jax.Array) -> jax.Array:
    params = cast_params(params, latents.dtype)
    latents = constrain(latents, BATCH, None, ROWS, None, None)
    video = apply_module(Decoder(cfg), params, latents)
    return constrain(video, BATCH, None, ROWS, None, None)
