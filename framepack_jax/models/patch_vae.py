"""A video autoencoder of matrix products, which a CPU trains in an hour: video <-> latents.

Each latent frame stands alone: the first for one frame, every other for `time_compression` frames.
A patch of these frames and `space_compression` rows and columns becomes one cell of the latents: a
linear map of its pixels, plus what a network of residual blocks adds, and back likewise. The linear
maps begin as the principal components of the patches of training clips (`fit`). Blocks are those of
ConvNeXt (arXiv 2201.03545): a convolution of each channel over 3x3 cells, and an MLP.

Shapes: B batch, T frames, H W rows and columns, C channels; F latent frames, h w rows and columns
of cells.
"""

import dataclasses
import functools
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax.models.autoencoder import ROWS, check_clip, draw_params, split_moments
from framepack_jax.models.network_spec import Preview, VaeSpec
from framepack_jax.models.params import Params, apply_module
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.sizes import Layers, Size
from framepack_jax.models.tiling import (
    DEFAULT_TILING,
    TileAxis,
    Tiling,
    apply_tiled,
    narrow_squares,
)
from framepack_jax.parallel.sharding import BATCH, REPLICATED, constrain

LOGVAR = -6.0
"""Log variance of the posterior before training."""
LEAST_SPREAD = 1e-3
"""Minimum standard deviation of a principal component, relative to that of the first."""


@dataclasses.dataclass(frozen=True)
class PatchVaeConfig:
    """Sizes of the network; `blocks` counts the residual blocks of each half."""

    in_channels: Size = 3
    latent_channels: Size = 16
    width: Size = 256
    blocks: Layers = 3
    mlp_ratio: Size = 4
    space_compression: Size = 8
    time_compression: Size = 4

    @property
    def out_channels(self) -> int:
        return self.in_channels

    @property
    def numbers(self) -> int:
        """Return how many numbers a patch has."""
        return self.time_compression * self.space_compression**2 * self.in_channels


class Block(nn.Module):
    """Return x (F, h, w, C) plus what its neighbours and an MLP add."""

    cfg: PatchVaeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.zeros, (3, 3, width))
        y = nn.LayerNorm(name="norm")(_over_neighbours(x, kernel))
        y = nn.gelu(nn.Dense(width * self.cfg.mlp_ratio, name="mlp_in")(y))
        return x + nn.Dense(width, name="mlp_out")(y)


class Half(nn.Module):
    """An encoder or decoder of cells: (F, h, w, inputs) -> (F, h, w, outputs).

    Of the outputs, `linear` are a linear map of the inputs plus the network's addition, which
    begins at zero; the others are the addition alone.
    """

    cfg: PatchVaeConfig
    linear: int
    outputs: int

    @nn.compact
    def __call__(self, cells: jax.Array) -> jax.Array:
        skip = nn.Dense(self.linear, name="linear")(cells)
        x = nn.Dense(self.cfg.width, name="stem")(cells)
        for number in range(self.cfg.blocks):
            x = Block(self.cfg, name=f"block_{number}")(x)
        x = nn.Dense(self.outputs, name="head")(nn.LayerNorm(name="norm")(x))
        added = x * self.param("gain", nn.initializers.zeros, (self.outputs,))[None, None, None]
        return added.at[..., : self.linear].add(skip)


def _over_neighbours(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Add to x (F, h, w, C) its eight neighbours and itself, by weights (3, 3, C); beyond the
    border is the cell there."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = x.shape[1:3]
    for row in range(3):
        for column in range(3):
            weight = kernel[None, None, None, row, column]
            x = x + weight * padded[:, row : row + height, column : column + width]
    return x


def _encoder(cfg: PatchVaeConfig) -> Half:
    return Half(cfg, cfg.latent_channels, 2 * cfg.latent_channels)


def _decoder(cfg: PatchVaeConfig) -> Half:
    return Half(cfg, cfg.numbers, cfg.numbers)


def init(cfg: PatchVaeConfig, key: jax.Array) -> Params:
    """Draw parameters {"encoder": ..., "decoder": ...}; kernels are scaled by their inputs."""

    def shapes(half: Half, inputs: int) -> Params:
        return jax.eval_shape(half.init, key, jnp.zeros((1, 1, 1, inputs)))["params"]

    halves = shapes(_encoder(cfg), cfg.numbers), shapes(_decoder(cfg), cfg.latent_channels)
    return draw_params(dict(zip(("encoder", "decoder"), halves, strict=True)), key)


def encode(
    cfg: PatchVaeConfig, params: Params, video: jax.Array, tiling: Tiling = DEFAULT_TILING
) -> tuple[jax.Array, jax.Array]:
    """Encode video (B, T, H, W, C) in [-1, 1]: mean and log variance of its latents, not
    normalised.

    Both are (B, 1 + (T - 1) // time_compression, H / space_compression, W / space_compression,
    latent_channels) in the video's dtype; the mean is the mode. Frames beyond the last whole patch
    are not read. Raises ValueError if H, W or the tiles are no multiples of the compression.
    """
    check_clip("video", video, cfg.in_channels, cfg.space_compression)
    network = functools.partial(_encode, cfg, tiling.frames is not None, params["encoder"])
    mean, logvar = split_moments(apply_tiled(network, video, None, _squares(cfg, tiling)))
    return mean, logvar + LOGVAR


def decode(
    cfg: PatchVaeConfig, params: Params, latents: jax.Array, tiling: Tiling = DEFAULT_TILING
) -> jax.Array:
    """Decode latents (B, F, h, w, C), not normalised, to video.

    The video (B, 1 + (F - 1) time_compression, h space_compression, w space_compression,
    in_channels) is in about [-1, 1], not clipped, in the latents' dtype. Raises ValueError if the
    tiles are no multiples of the compression.
    """
    check_clip("latents", latents, cfg.latent_channels, 1)
    space = _squares(cfg, tiling)
    network = functools.partial(_decode, cfg, tiling.frames is not None, params["decoder"])
    return apply_tiled(network, latents, None, space and space.swapped())


def check_tiling(cfg: PatchVaeConfig, tiling: Tiling) -> None:
    """Raise ValueError if the tiles are no multiples of the compression."""
    _squares(cfg, tiling)


def _squares(cfg: PatchVaeConfig, tiling: Tiling) -> TileAxis | None:
    return narrow_squares(tiling, cfg.time_compression, cfg.space_compression)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(cfg: PatchVaeConfig, chunked: bool, params: Params, video: jax.Array) -> jax.Array:
    return _each_frame(_encoder(cfg), params, patches(cfg, video), chunked)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(cfg: PatchVaeConfig, chunked: bool, params: Params, latents: jax.Array) -> jax.Array:
    return pixels(cfg, _each_frame(_decoder(cfg), params, latents, chunked))


def _each_frame(half: Half, params: Params, cells: jax.Array, chunked: bool) -> jax.Array:
    """Compute cells (B, F, h, w, C), frame by frame or all at once."""
    params = cast_params(params, cells.dtype)
    cells = constrain(cells, BATCH, None, ROWS, None, None)
    apply = functools.partial(apply_module, half, params)
    if chunked:
        return jnp.moveaxis(jax.lax.map(apply, jnp.moveaxis(cells, 1, 0)), 0, 1)
    batch, frames = cells.shape[:2]
    out = apply(cells.reshape(-1, *cells.shape[2:]))
    return constrain(out.reshape(batch, frames, *out.shape[1:]), BATCH, None, ROWS, None, None)


def patches(cfg: PatchVaeConfig, video: jax.Array) -> jax.Array:
    """Cut video (B, T, H, W, C) into patches (B, F, h, w, numbers). The first frame is repeated to
    the length of a patch."""
    time, space = cfg.time_compression, cfg.space_compression
    frames = 1 + (video.shape[1] - 1) // time
    video = video[:, : 1 + (frames - 1) * time]
    video = jnp.concatenate([jnp.repeat(video[:, :1], time - 1, axis=1), video], axis=1)
    batch, _, height, width, channels = video.shape
    rows, columns = height // space, width // space
    x = video.reshape(batch, frames, time, rows, space, columns, space, channels)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, frames, rows, columns, -1)


def pixels(cfg: PatchVaeConfig, cells: jax.Array) -> jax.Array:
    """Join patches (B, F, h, w, numbers) to video (B, T, H, W, C); the last frame of the first
    patch is the first frame."""
    time, space = cfg.time_compression, cfg.space_compression
    batch, frames, rows, columns, _ = cells.shape
    x = cells.reshape(batch, frames, rows, columns, time, space, space, -1)
    x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(batch, frames * time, rows * space, columns * space, -1)[:, time - 1 :]


def fit(cfg: PatchVaeConfig, params: Params, clips: Iterable[np.ndarray]) -> Params:
    """Return the parameters with linear maps that are the principal components of the patches of
    clips (B, T, H, W, C) in [-1, 1]: latents have mean 0 and variance 1, uncorrelated.

    Raises ValueError if patches have fewer directions than latents have channels.
    """
    count, total, products = 0, np.zeros(cfg.numbers), np.zeros((cfg.numbers, cfg.numbers))
    for clip in clips:
        x = np.asarray(patches(cfg, jnp.asarray(clip)), np.float64).reshape(-1, cfg.numbers)
        count, total, products = count + len(x), total + x.sum(0), products + x.T @ x
    mean = total / count
    variances, directions = np.linalg.eigh(products / count - np.outer(mean, mean))
    order = np.argsort(-variances)[: cfg.latent_channels]
    spread, directions = np.sqrt(np.maximum(variances[order], 0)), directions[:, order]
    if spread.size < cfg.latent_channels or spread[-1] <= LEAST_SPREAD * spread[0]:
        raise ValueError(
            f"the patches of the clips vary in fewer than {cfg.latent_channels} directions: give"
            " more clips, or a VAE of fewer latent channels"
        )
    into, out = directions / spread, directions.T * spread[:, None]
    linear = {
        "encoder": {"kernel": into, "bias": -mean @ into},
        "decoder": {"kernel": out, "bias": mean},
    }
    return {
        half: leaves | {"linear": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), linear[half])}
        for half, leaves in params.items()
    }


def preview(cfg: PatchVaeConfig, params: Params) -> Preview:
    """Return the mean colour of a patch, as the linear map of the decoder gives it."""
    linear = params["decoder"]["linear"]
    weight, bias = (np.asarray(linear[name], np.float32) for name in ("kernel", "bias"))
    colours = weight.reshape(cfg.latent_channels, -1, cfg.in_channels).mean(axis=1)
    return colours, bias.reshape(-1, cfg.in_channels).mean(axis=0)


SPEC = VaeSpec(
    kind="patch_vae",
    config=PatchVaeConfig,
    init=init,
    sharding_rules=REPLICATED,
    stacks={},
    encode=encode,
    decode=decode,
    check_tiling=check_tiling,
    latent_statistics=lambda cfg: None,
    preview=preview,
    exact_chunks=True,
    fit=fit,
)
