"""Blocks of Wan's transformer, and the head.

Source: Wan (arXiv 2503.20314, section 4.2) and Helios (arXiv 2603.04379), whose blocks read packed
context beside the target. Modulation is computed in float32.

Shapes: B batch, L tokens, N heads, D width = N heads x head width.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from framepack_jax.models.transformer_parts import (
    divide_columns,
    divide_stream,
    gated,
    merge_heads,
    modulate,
)
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.ops.attention import attend, to_heads
from framepack_jax.ops.causal_frames import TargetFrames, attend_by_frame
from framepack_jax.ops.rope import Table, apply_rope
from framepack_jax.parallel.sharding import BATCH, TOKENS, constrain


class Streams(NamedTuple):
    """An array for the context tokens and one for the target tokens; None without context."""

    context: jax.Array | None
    target: jax.Array

    def map(self, change: Callable[..., jax.Array], *others: "Streams") -> "Streams":
        """Apply `change` to the context's arrays, if there are any, and to the target's."""
        context, target = zip(self, *others, strict=True)
        return Streams(None if self.context is None else change(*context), change(*target))

    def joined(self) -> jax.Array:
        """Concatenate tokens (B, L, ...), those of the target last."""
        parts = [part for part in self if part is not None]
        return jnp.concatenate(parts, axis=1)

    def split(self, x: jax.Array) -> "Streams":
        """Divide x (B, L, ...), all tokens, as these streams are."""
        length = 0 if self.context is None else self.context.shape[1]
        return Streams(None if self.context is None else x[:, :length], x[:, length:])


class Block(nn.Module):
    """Self-attention over all tokens, cross-attention to the prompt, feed-forward.

    Context and target are streams (B, L, D) with the same weights. Each has a modulation (B, 6, D):
    shift, scale and gate of self-attention, then of the feed-forward.
    """

    cfg: WanConfig

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        text: jax.Array,
        modulation: Streams,
        rope: Table,
        masked: jax.Array | None = None,
        frames: TargetFrames | None = None,
    ) -> Streams:
        cfg = self.cfg
        table = self.param("modulation", nn.initializers.normal(cfg.width**-0.5), (6, cfg.width))
        parts = modulation.map(lambda m: m + table.astype(jnp.float32)[None])
        streams = self.self_attention(streams, parts, rope, masked, frames)
        read = self.cross_attention(text)
        if cfg.prompt_to_target:
            streams = streams._replace(target=read(streams.target))
        else:
            streams = streams.map(read)
        return self.feed_forward(streams, parts)

    def self_attention(
        self,
        streams: Streams,
        parts: Streams,
        rope: Table,
        masked: jax.Array | None,
        frames: TargetFrames | None,
    ) -> Streams:
        cfg = self.cfg
        qkv = nn.DenseGeneral((3, cfg.heads, cfg.head_dim), name="qkv")
        out = nn.Dense(cfg.width, name="out")
        q_norm, k_norm = WideNorm(cfg, name="q_norm"), WideNorm(cfg, name="k_norm")

        def project(x: jax.Array, m: jax.Array) -> jax.Array:
            fused = _divide_heads(qkv(modulate(x, m[:, 0:1], m[:, 1:2], cfg.norm_eps)))
            q, k, v = (fused[:, :, i] for i in range(3))
            # One all-to-all for all three; joining the streams then needs no further exchange.
            return to_heads(jnp.stack([q_norm(q), k_norm(k), v], axis=2))

        fused = streams.map(project, parts)
        q, k, v = (fused.map(lambda x, i=i: x[:, :, i]).joined() for i in range(3))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cfg.context_key_scale != "none":
            each = fused.split(k)
            k = each._replace(context=self.scale_keys(each.context)).joined()
        attention = fused.split(attend_by_frame(q, k, v, None, masked, frames))
        return streams.map(
            lambda x, a, m: gated(x, m[:, 2:3], out(merge_heads(a))), attention, parts
        )

    def scale_keys(self, keys: jax.Array | None) -> jax.Array | None:
        """Multiply keys (B, L, N, head_dim) of context by a learned factor from 1 to 10."""
        heads = self.cfg.heads if self.cfg.context_key_scale == "each" else 1
        logit = self.param("context_key_scale", nn.initializers.ones, (heads,))
        factor = 1 + 9 * jax.nn.sigmoid(logit.astype(jnp.float32))[None, None, :, None]
        return None if keys is None else (keys.astype(jnp.float32) * factor).astype(keys.dtype)

    def cross_attention(self, text: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """Return a function that adds to tokens (B, L, D) what they read of text (B, L_text, D)."""
        cfg = self.cfg
        q_proj = nn.DenseGeneral((cfg.heads, cfg.head_dim), name="cross_q")
        q_norm = WideNorm(cfg, name="cross_q_norm")
        out = nn.Dense(cfg.width, name="cross_out")
        norm = nn.LayerNorm(cfg.norm_eps, use_fast_variance=False, name="cross_norm")
        kv = nn.DenseGeneral((2, cfg.heads, cfg.head_dim), name="cross_kv")(text)
        k = WideNorm(cfg, name="cross_k_norm")(kv[:, :, 0])

        def read(x: jax.Array) -> jax.Array:
            q = q_norm(_divide_heads(q_proj(norm(x).astype(x.dtype))))
            attention = attend(q, k, kv[:, :, 1], local=True)
            attention = divide_columns(rearrange(attention, "b l n d -> b l (n d)"))
            return divide_stream(x + out(attention))

        return read

    def feed_forward(self, streams: Streams, parts: Streams) -> Streams:
        cfg = self.cfg
        mlp_in, mlp_out = nn.Dense(cfg.mlp_dim, name="mlp_in"), nn.Dense(cfg.width, name="mlp_out")

        def add(x: jax.Array, m: jax.Array) -> jax.Array:
            hidden = mlp_in(modulate(x, m[:, 3:4], m[:, 4:5], cfg.norm_eps))
            hidden = divide_columns(nn.gelu(hidden, approximate=True))
            return gated(x, m[:, 5:6], mlp_out(hidden))

        return streams.map(add, parts)


class WideNorm(nn.Module):
    """RMS norm over the heads together of q or k (B, L, N, head_dim), in float32."""

    cfg: WanConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (self.cfg.heads, self.cfg.head_dim))
        x32 = x.astype(jnp.float32)
        power = jnp.mean(x32**2, axis=(-2, -1), keepdims=True)
        normed = x32 * jax.lax.rsqrt(power + self.cfg.norm_eps)
        return (normed * scale.astype(jnp.float32)[None, None]).astype(x.dtype)


class Head(nn.Module):
    """Final modulated norm and projection to patches, in float32 at full matmul precision."""

    cfg: WanConfig

    @nn.compact
    def __call__(self, x: jax.Array, vec: jax.Array) -> jax.Array:
        cfg = self.cfg
        table = self.param("modulation", nn.initializers.normal(cfg.width**-0.5), (2, cfg.width))
        parts = vec.astype(jnp.float32)[:, None] + table.astype(jnp.float32)[None]
        x = modulate(x.astype(jnp.float32), parts[:, 0:1], parts[:, 1:2], cfg.norm_eps)
        highest = jax.lax.Precision.HIGHEST
        return nn.Dense(4 * cfg.out_channels, precision=highest, name="out")(x)


def _divide_heads(x: jax.Array) -> jax.Array:
    """Divide projections (B, L, ..., N, head_dim): tokens like a stream, heads by `tensor`."""
    return constrain(x, BATCH, TOKENS, *(None,) * (x.ndim - 4), "tensor", None)
