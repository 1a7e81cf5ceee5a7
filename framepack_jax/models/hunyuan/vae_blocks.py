"""Encoder and decoder of HunyuanVideo's causal 3-D variational autoencoder.

Source: HunyuanVideo (arXiv 2412.03603, section 4.1). Convolutions and attention look back in time
only; group norms average over the whole clip.

Shapes: B batch, T frames, H W rows and columns, C channels, L = H W tokens of a frame.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from framepack_jax.models.hunyuan.config import Stride, VaeConfig
from framepack_jax.ops.attention import attend
from framepack_jax.ops.conv import causal_conv3d

NORM_EPS = 1e-6


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
    """Repeat every cell, the first frame in space only: (B, T, ...) -> (B, 1 + (T - 1) t, ...)."""
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
    """Residual block: twice norm, SiLU, convolution; a 1x1x1 shortcut if the width changes."""

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

        # Frame by frame, so that a query reads a prefix of the keys.
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

    Flax's own reduces over (T, H, W, group) at once; reducing each channel first is three times
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
