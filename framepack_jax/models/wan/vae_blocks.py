"""Encoder and decoder of Wan 2.1's causal 3-D autoencoder.

A clip is computed whole, or chunk by chunk: every causal convolution leaves its last input frames
in the collection `cache`, and the next chunk reads them there. Norms and attention see one frame,
so both ways give the same numbers. The first frame of a clip (`first`, for the chunk that begins
with it) passes all changes of the frame rate alone.

Source: Wan (arXiv 2503.20314, section 4.1) and `AutoencoderKLWan` of diffusers.

Shapes: B batch, T frames, H W rows and columns, C channels, L = H W tokens of a frame.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from framepack_jax.models.wan.vae_config import WanVaeConfig
from framepack_jax.ops.attention import attend
from framepack_jax.ops.conv import Size, Stride, conv3d

CACHE = "cache"
NORM_EPS = 1e-12


class Encoder(nn.Module):
    """Video (B, T, H, W, C) -> moments (B, t, h, w, 2 latent_channels): mean, log variance."""

    cfg: WanVaeConfig

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        cfg = self.cfg
        x = Conv(cfg.width, name="conv_in")(x, first)
        for i, (width, time) in enumerate(zip(cfg.channels, (*cfg.halves_time, None), strict=True)):
            x = Down(cfg.layers_per_block, width, time, name=f"down_{i}")(x, first)
        x = Mid(name="mid")(x, first)
        x = nn.silu(Norm(name="norm_out")(x))
        x = Conv(2 * cfg.latent_channels, name="conv_out")(x, first)
        return Conv(2 * cfg.latent_channels, (1, 1, 1), name="quant")(x, first)


class Decoder(nn.Module):
    """Latents (B, t, h, w, latent_channels) -> video (B, T, H, W, C), not clamped."""

    cfg: WanVaeConfig

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        cfg = self.cfg
        x = Conv(cfg.latent_channels, (1, 1, 1), name="post_quant")(x, first)
        x = Conv(cfg.channels[-1], name="conv_in")(x, first)
        x = Mid(name="mid")(x, first)
        times = (*cfg.halves_time[::-1], None)
        for i, (width, time) in enumerate(zip(cfg.channels[::-1], times, strict=True)):
            x = Up(cfg.layers_per_block + 1, width, time, name=f"up_{i}")(x, first)
        x = nn.silu(Norm(name="norm_out")(x))
        return Conv(cfg.out_channels, name="conv_out")(x, first)


class Down(nn.Module):
    """Residual blocks at one resolution, then half the height and width, and half the frames if
    `time`; no halving if it is None."""

    layers: int
    width: int
    time: bool | None

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        for j in range(self.layers):
            x = Resnet(self.width, name=f"resnet_{j}")(x, first)
        if self.time is None:
            return x
        margins = ((0, 1), (0, 1))
        x = Conv(self.width, (1, 3, 3), (1, 2, 2), margins, name="space")(x, first)
        if not self.time:
            return x
        convolve = Conv(self.width, (3, 1, 1), (2, 1, 1), name="time")
        if not first:
            return convolve(x, first)
        # The first window begins with the first frame, which is kept too.
        kept, rest = x[:, :1], x[:, 1:]
        return jnp.concatenate([kept, convolve(rest, first, before=kept)], axis=1)


class Up(nn.Module):
    """Residual blocks at one resolution, then twice the frames if `time`, twice the height and
    width, and half the channels; no doubling if it is None."""

    layers: int
    width: int
    time: bool | None

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        for j in range(self.layers):
            x = Resnet(self.width, name=f"resnet_{j}")(x, first)
        if self.time is None:
            return x
        if self.time:
            # The first frame stays one. The second sees zeros before it.
            kept, rest = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
            pairs = Conv(2 * self.width, (3, 1, 1), name="time")(rest, first)
            pairs = rearrange(pairs, "b t h w (two c) -> b (t two) h w c", two=2)
            x = jnp.concatenate([kept, pairs], axis=1)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return Conv(self.width // 2, (1, 3, 3), name="space")(x, first)


class Mid(nn.Module):
    """Two residual blocks with attention between them, at the lowest resolution."""

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        x = Resnet(x.shape[-1], name="resnet_0")(x, first)
        x = x + Attention(name="attention")(x)
        return Resnet(x.shape[-1], name="resnet_1")(x, first)


class Resnet(nn.Module):
    """Residual block: twice norm, SiLU, convolution; a 1x1x1 shortcut if the width changes."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        h = x
        for i in (1, 2):
            h = nn.silu(Norm(name=f"norm{i}")(h))
            h = Conv(self.width, name=f"conv{i}")(h, first)
        if x.shape[-1] != self.width:
            x = Conv(self.width, (1, 1, 1), name="shortcut")(x, first)
        return x + h


class Attention(nn.Module):
    """One head of attention within each frame, without the residual."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, _, height, _, channels = x.shape
        x = rearrange(Norm(name="norm")(x), "b t h w c -> (b t) (h w) c")
        qkv = nn.DenseGeneral((3, 1, channels), name="qkv")(x)
        x = attend(*(qkv[:, :, i] for i in range(3)))
        x = rearrange(x, "(b t) (h w) 1 c -> b t h w c", b=batch, h=height)
        return nn.Dense(channels, name="out")(x)


class Norm(nn.Module):
    """RMS norm over the channels, in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        y = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(y), axis=-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.maximum(square, NORM_EPS**2)) * channels**0.5
        return (y * factor * scale[None, None, None, None, :]).astype(x.dtype)


class Conv(nn.Module):
    """A convolution that looks back in time; `margins` are the zeros around height and width."""

    features: int
    size: Size = (3, 3, 3)
    stride: Stride = (1, 1, 1)
    margins: tuple[tuple[int, int], tuple[int, int]] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, first: bool, before: jax.Array | None = None) -> jax.Array:
        """Convolve x with the frames before it: of the chunk before, or, if it is the `first`,
        `before` (default: zeros)."""
        shape = (*self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = self._with_past(x, first, before)
        if x.shape[1] < self.size[0]:
            # A first chunk of one frame, where the frame rate changes.
            return jnp.zeros((x.shape[0], 0, *x.shape[2:4], self.features), x.dtype)
        rows, columns = self.margins or ((k // 2, k // 2) for k in self.size[1:])
        x = jnp.pad(x, [(0, 0), (0, 0), rows, columns, (0, 0)])
        return conv3d(x, kernel, bias, self.stride)

    def _with_past(self, x: jax.Array, first: bool, before: jax.Array | None) -> jax.Array:
        """Put the frames that the first window sees before x, and leave the last ones behind."""
        past = self.size[0] - self.stride[0]
        if not past:
            return x
        if not first:
            before = self.get_variable(CACHE, "frames")
        if before is None:
            x = jnp.pad(x, [(0, 0), (past, 0), (0, 0), (0, 0), (0, 0)])
        else:
            x = jnp.concatenate([before, x], axis=1)
        if self.is_mutable_collection(CACHE):
            self.put_variable(CACHE, "frames", x[:, -past:])
        return x
