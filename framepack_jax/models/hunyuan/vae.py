"""HunyuanVideo's causal 3-D variational autoencoder: video <-> latents.

Source: HunyuanVideo (arXiv 2412.03603, section 4.1); tiles in time are those of diffusers'
`AutoencoderKLHunyuanVideo`, those in space have one shape wherever they lie. The first latent frame
stands for one frame of video, every other for `time_compression` frames. Convolutions and attention
look back in time only, but group norms average over the whole clip: a clip taken in tiles differs
from one taken at once.

Shapes: B batch, T frames, H W rows and columns, C channels, L = H W tokens of a frame.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from framepack_jax.models.params import Params
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.sizes import Layers, Size
from framepack_jax.ops.attention import attend
from framepack_jax.ops.conv import causal_conv3d
from framepack_jax.parallel.sharding import BATCH, constrain

STACKS: dict[str, str] = {}
# Small weights, large activations: every device has all weights and takes some rows of the picture.
# What is asked of the input holds for all that is computed from it.
SHARDINGS = ((r".*", ()),)
ROWS = ("context", "fsdp", "tensor", "data")
NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)

Stride = tuple[int, int, int]
Network = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the network; `channels` has one entry for each resolution, finest first."""

    in_channels: Size = 3
    out_channels: Size = 3
    latent_channels: Size = 16
    channels: tuple[Size, ...] = (128, 256, 512, 512)
    layers_per_block: Layers = 2
    norm_groups: Size = 32
    space_compression: Size = 8
    time_compression: Size = 4

    def __post_init__(self) -> None:
        limits = {
            "space_compression": 2 ** len(self.channels),
            "time_compression": 2 ** (len(self.channels) - 1),
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if value.bit_count() != 1 or value > limit:
                raise ValueError(
                    f"VAE {name} is {value}; {len(self.channels)} blocks (`channels`) can do"
                    f" powers of two up to {limit}"
                )

    @property
    def strides(self) -> tuple[Stride, ...]:
        """(time, height, width) by which each block of the encoder, and of the decoder in its own
        order, resizes: space in the first blocks, time in the last but one."""
        last = len(self.channels) - 1
        in_space = self.space_compression.bit_length() - 1
        in_time = self.time_compression.bit_length() - 1
        return tuple(
            (1 + (last - in_time <= i < last), *(1 + (i < in_space),) * 2) for i in range(last + 1)
        )


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a long or large video is taken apart, in pixels and frames of the video.

    Clips of `frames` + 1 frames every `frame_stride`, and squares of side `size` every `stride`,
    the last as far in as lets it be whole; neighbours are cross-faded where they overlap. None
    takes the whole length or area at once. The default is diffusers' own; after `enable_tiling()`
    it has squares of 256 every 192, and narrower ones at the border.
    """

    frames: int | None = 16
    frame_stride: int = 12
    size: int | None = None
    stride: int | None = None


def init(cfg: VaeConfig, key: jax.Array) -> Params:
    """Random parameters, {"encoder": ..., "decoder": ...}; kernels are scaled by their inputs."""
    side = cfg.space_compression
    video = jnp.zeros((1, 1, side, side, cfg.in_channels))
    latents = jnp.zeros((1, 1, 1, 1, cfg.latent_channels))
    shapes = {
        "encoder": jax.eval_shape(Encoder(cfg).init, key, video)["params"],
        "decoder": jax.eval_shape(Decoder(cfg).init, key, latents)["params"],
    }
    leaves = flatten_dict(shapes)
    # One draw for all kernels: compiling a generator for each of their shapes takes a minute.
    sizes = [leaf.size for path, leaf in leaves.items() if path[-1] == "kernel"]
    noise = iter(jnp.split(jax.random.normal(key, sum(sizes)), np.cumsum(sizes)[:-1]))
    for path, leaf in leaves.items():
        if path[-1] == "kernel":
            inputs = leaf.size // leaf.shape[-1]
            leaves[path] = next(noise).reshape(leaf.shape) * inputs**-0.5
        else:
            leaves[path] = jnp.full(leaf.shape, path[-1] == "scale", leaf.dtype)
    return unflatten_dict(leaves)


def encode(
    cfg: VaeConfig, params: Params, video: jax.Array, tiling: Tiling = Tiling()
) -> tuple[jax.Array, jax.Array]:
    """Video (B, T, H, W, C) in [-1, 1] -> mean and log variance of its latents, not scaled.

    Both are (B, 1 + (T - 1) // time_compression, H / space_compression, W / space_compression,
    latent_channels) in the video's dtype; the mean is the mode. Raises ValueError where H, W or
    the tiles are no multiples of the compression.
    """
    _check(cfg, "video", video, cfg.in_channels, cfg.space_compression)
    time, space = _axes(cfg, tiling)
    moments = _tiled(functools.partial(_encode, cfg, params["encoder"]), video, time, space)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def decode(
    cfg: VaeConfig, params: Params, latents: jax.Array, tiling: Tiling = Tiling()
) -> jax.Array:
    """Latents (B, T, H, W, C), not scaled -> video (B, 1 + (T - 1) time_compression,
    H space_compression, W space_compression, out_channels), about [-1, 1] and not clipped, in the
    latents' dtype. Raises ValueError where the tiles are no multiples of the compression.
    """
    _check(cfg, "latents", latents, cfg.latent_channels, 1)
    time, space = (axis and axis.swapped() for axis in _axes(cfg, tiling))
    return _tiled(functools.partial(_decode, cfg, params["decoder"]), latents, time, space)


# Compiled once for each shape of tile, of which even a long video has few.
@functools.partial(jax.jit, static_argnames="cfg")
def _encode(cfg: VaeConfig, params: Params, video: jax.Array) -> jax.Array:
    params = cast_params(params, video.dtype)
    return Encoder(cfg).apply({"params": params}, constrain(video, BATCH, None, ROWS, None, None))


@functools.partial(jax.jit, static_argnames="cfg")
def _decode(cfg: VaeConfig, params: Params, latents: jax.Array) -> jax.Array:
    params = cast_params(params, latents.dtype)
    latents = constrain(latents, BATCH, None, ROWS, None, None)
    video = Decoder(cfg).apply({"params": params}, latents)
    return constrain(video, BATCH, None, ROWS, None, None)


def _check(cfg: VaeConfig, name: str, x: jax.Array, channels: int, multiple: int) -> None:
    if x.ndim != 5 or x.shape[-1] != channels:
        raise ValueError(f"VAE: {name} must be (B, T, H, W, {channels}), got {x.shape}")
    if x.shape[2] % multiple or x.shape[3] % multiple:
        raise ValueError(
            f"VAE: height and width of {name} must be multiples of {multiple}, got"
            f" {x.shape[2]}x{x.shape[3]}; resize or crop it"
        )


class Axis(NamedTuple):
    """Tiles along time or space: length and distance, in the input and in the output; neighbours
    are cross-faded where they overlap."""

    size: int
    stride: int
    out_size: int
    out_stride: int

    @property
    def out_overlap(self) -> int:
        return self.out_size - self.out_stride

    def out(self, length: int) -> int:
        """A length in the input as one in the output."""
        return length * self.out_size // self.size

    def starts(self, length: int) -> list[int]:
        """Where tiles begin: a stride apart, but that the last ends where the input does. So all
        have one shape, and none is a sliver whose norms see little."""
        last = max(0, length - self.size)
        return sorted({min(start, last) for start in range(0, length, self.stride)})

    def overlap(self, starts: list[int], number: int) -> int:
        """Of a tile in the output with the one before it."""
        return self.out(starts[number - 1] + self.size - starts[number])

    def swapped(self) -> "Axis":
        return Axis(self.out_size, self.out_stride, self.size, self.stride)


def check_tiling(cfg: VaeConfig, tiling: Tiling) -> None:
    """Raise ValueError where the VAE cannot take such tiles."""
    _axes(cfg, tiling)


def _axes(cfg: VaeConfig, tiling: Tiling) -> tuple[Axis | None, Axis | None]:
    """Tiles of the encoder in time and in space."""

    def axis(name: str, size: int | None, stride: int | None, ratio: int) -> Axis | None:
        if size is None:
            return None
        if stride is None or not 0 < stride <= size or size % ratio or stride % ratio:
            raise ValueError(
                f"VAE tiling: {name} {size} at a stride of {stride}; both must be multiples of"
                f" {ratio}, and the stride no longer than the tile"
            )
        return Axis(size, stride, size // ratio, stride // ratio)

    return (
        axis("frames", tiling.frames, tiling.frame_stride, cfg.time_compression),
        axis("size", tiling.size, tiling.stride, cfg.space_compression),
    )


def _tiled(network: Network, x: jax.Array, time: Axis | None, space: Axis | None) -> jax.Array:
    """network(x), tile by tile where x is longer or larger than a tile."""

    def clip(x: jax.Array) -> jax.Array:
        tiles = space and max(x.shape[2:4]) > space.size
        return _tiled_space(network, x, space) if tiles else network(x)

    return _tiled_time(clip, x, time) if time and x.shape[1] > time.size else clip(x)


def _tiled_time(network: Network, x: jax.Array, axis: Axis) -> jax.Array:
    """Clips share one frame with the next: it is the single first frame of the later clip, and
    dropped there. (A last clip of that frame alone has nothing to add.)"""
    kept, clip = [], None
    for start in range(0, x.shape[1] - 1, axis.stride):
        new = network(x[:, start : start + axis.size + 1])
        clip = new if clip is None else _blend(clip, new[:, 1:], axis.out_overlap, 1)
        kept.append(clip[:, : axis.out_stride + (start == 0)])
    return jnp.concatenate(kept, axis=1)


def _tiled_space(network: Network, x: jax.Array, axis: Axis) -> jax.Array:
    """Squares in reading order, each faded over the finished ones above and to the left."""
    tops, lefts = axis.starts(x.shape[2]), axis.starts(x.shape[3])
    rows: list[list[jax.Array]] = []
    for top in tops:
        row: list[jax.Array] = []
        for left in lefts:
            tile = network(x[:, :, top : top + axis.size, left : left + axis.size])
            if rows:
                tile = _blend(rows[-1][len(row)], tile, axis.overlap(tops, len(rows)), 2)
            if row:
                tile = _blend(row[-1], tile, axis.overlap(lefts, len(row)), 3)
            row.append(tile)
        rows.append(row)
    bands = [_joined(row, lefts, axis, 3) for row in rows]
    return _joined(bands, tops, axis, 2)


def _joined(tiles: list[jax.Array], starts: list[int], axis: Axis, dimension: int) -> jax.Array:
    """Each tile up to where the next begins."""
    *others, last = tiles
    kept = [
        jax.lax.slice_in_dim(tile, 0, axis.out(after - start), axis=dimension)
        for tile, (start, after) in zip(others, itertools.pairwise(starts), strict=True)
    ]
    return jnp.concatenate([*kept, last], axis=dimension)


@functools.partial(jax.jit, static_argnames=("overlap", "axis"))
def _blend(before: jax.Array, after: jax.Array, overlap: int, axis: int) -> jax.Array:
    """`after`, its first cells along `axis` cross-faded with the last ones of `before`: weight
    i / n of `after` at cell i, where n is `overlap` or what the shorter tile has."""
    n = min(overlap, before.shape[axis], after.shape[axis])
    old = jax.lax.slice_in_dim(before, before.shape[axis] - n, None, axis=axis)
    new, rest = jnp.split(after, [n], axis=axis)
    weight = np.expand_dims(np.arange(n) / max(n, 1), [i for i in range(after.ndim) if i != axis])
    weight = jnp.asarray(weight, jnp.float32)
    faded = old * (1 - weight) + new * weight
    return jnp.concatenate([faded.astype(after.dtype), rest], axis=axis)


class Encoder(nn.Module):
    """Video (B, T, H, W, C) -> moments (B, t, h, w, 2 latent_channels): mean, log variance."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.cfg
        x = Conv(cfg.channels[0], name="conv_in")(x)
        for i, (width, stride) in enumerate(zip(cfg.channels, cfg.strides, strict=True)):
            x = Down(cfg, width, stride, name=f"down_{i}")(x)
        x = Mid(cfg, name="mid")(x)
        x = nn.silu(Norm(cfg, name="norm_out")(x))
        x = Conv(2 * cfg.latent_channels, name="conv_out")(x)
        return Conv(2 * cfg.latent_channels, size=1, name="quant")(x)


class Decoder(nn.Module):
    """Latents (B, t, h, w, latent_channels) -> video (B, T, H, W, C)."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.cfg
        x = Conv(cfg.latent_channels, size=1, name="post_quant")(x)
        x = Conv(cfg.channels[-1], name="conv_in")(x)
        x = Mid(cfg, name="mid")(x)
        for i, (width, stride) in enumerate(zip(cfg.channels[::-1], cfg.strides, strict=True)):
            x = Up(cfg, width, stride, name=f"up_{i}")(x)
        x = nn.silu(Norm(cfg, name="norm_out")(x))
        return Conv(cfg.out_channels, name="conv_out")(x)


class Down(nn.Module):
    """Residual blocks at one resolution, then a strided convolution to the next."""

    cfg: VaeConfig
    width: int
    stride: Stride

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for j in range(self.cfg.layers_per_block):
            x = Resnet(self.cfg, self.width, name=f"resnet_{j}")(x)
        if max(self.stride) > 1:
            x = Conv(self.width, stride=self.stride, name="downsample")(x)
        return x


class Up(nn.Module):
    """Residual blocks at one resolution, then nearest upsampling and a convolution."""

    cfg: VaeConfig
    width: int
    stride: Stride

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for j in range(self.cfg.layers_per_block + 1):
            x = Resnet(self.cfg, self.width, name=f"resnet_{j}")(x)
        if max(self.stride) > 1:
            x = Conv(self.width, name="upsample")(upsample(x, self.stride))
        return x


def upsample(x: jax.Array, factor: Stride) -> jax.Array:
    """Repeat every cell; the first frame stays one: (B, T, H, W, C) -> (B, 1 + (T - 1) t, ...)."""
    t, h, w = factor
    x = jnp.repeat(jnp.repeat(x, h, axis=2), w, axis=3)
    return jnp.repeat(x, t, axis=1)[:, t - 1 :]


class Mid(nn.Module):
    """Two residual blocks with attention between them, at the lowest resolution."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Resnet(self.cfg, x.shape[-1], name="resnet_0")(x)
        x = x + Attention(self.cfg, name="attention")(x)
        return Resnet(self.cfg, x.shape[-1], name="resnet_1")(x)


class Resnet(nn.Module):
    """Residual block: twice norm, SiLU, convolution; a 1x1x1 shortcut where the width changes."""

    cfg: VaeConfig
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for i in (1, 2):
            h = nn.silu(Norm(self.cfg, name=f"norm{i}")(h))
            h = Conv(self.width, name=f"conv{i}")(h)
        if x.shape[-1] != self.width:
            x = Conv(self.width, size=1, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """One head of attention, full within a frame and causal across frames, without the residual."""

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, frames, height, width, channels = x.shape
        x = rearrange(Norm(self.cfg, name="norm")(x), "b t h w c -> b (t h w) c")
        qkv = nn.DenseGeneral((3, 1, channels), name="qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        cells = height * width

        # Frame by frame, so that what a query may read is a prefix of the keys.
        def attend_frame(frame: tuple[jax.Array, jax.Array]) -> jax.Array:
            q, visible = frame
            valid = jnp.broadcast_to(jnp.arange(k.shape[1])[None, :] < visible, (batch, k.shape[1]))
            return attend(q, k, v, valid)

        q = rearrange(q, "b (t l) n c -> t b l n c", t=frames)
        out = jax.lax.map(attend_frame, (q, cells * (1 + jnp.arange(frames))))
        out = rearrange(out, "t b (h w) 1 c -> b t h w c", h=height)
        return nn.Dense(channels, name="out")(out)


class Norm(nn.Module):
    """Group norm over time, space and the channels of a group; statistics in float32.

    flax's own reduces over (T, H, W, group) at once; channel by channel first is three times
    faster on a CPU.
    """

    cfg: VaeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def group_mean(y: jax.Array) -> jax.Array:
            means = rearrange(y.mean((1, 2, 3)), "b (g c) -> b g c", g=self.cfg.norm_groups)
            means = jnp.repeat(means.mean(2), channels // self.cfg.norm_groups, axis=1)
            return means[:, None, None, None, :]

        y = x.astype(jnp.float32)
        y = y - group_mean(y)
        factor = jax.lax.rsqrt(group_mean(jnp.square(y)) + NORM_EPS)
        y = y * (factor * scale[None, None, None, None, :]) + bias[None, None, None, None, :]
        return y.astype(x.dtype)


class Conv(nn.Module):
    """A causal convolution with a cubic kernel."""

    features: int
    size: int = 3
    stride: Stride = (1, 1, 1)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*(self.size,) * 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return causal_conv3d(x, kernel, bias, self.stride)
