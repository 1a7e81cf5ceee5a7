"""Transformer blocks: refiner, double stream, single stream, and the head.

Source: HunyuanVideo (arXiv 2412.03603). Modulation is computed in float32.

Shapes: B batch, L tokens, N heads, D width = N heads x head width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.transformer_parts import divide_columns, gated, merge_heads, modulate
from framepack_jax.ops.attention import attend, to_heads
from framepack_jax.ops.causal_frames import TargetFrames, attend_by_frame
from framepack_jax.ops.rope import Table, apply_rope
from framepack_jax.parallel.sharding import BATCH, TOKENS, constrain

Streams = tuple[jax.Array, jax.Array]
"""Image tokens (B, L, D) and text tokens (B, L, D)."""


class RefinerBlock(nn.Module):
    """Transformer block of the text tokens; time and mean text gate its branches."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, vec: jax.Array, valid: jax.Array) -> jax.Array:
        cfg = self.cfg
        gate_attention, gate_mlp = _modulation(cfg, vec, 2, "gate")
        normed = nn.LayerNorm(1e-6, use_fast_variance=False, name="norm1")(x)
        q, k, v = _qkv(cfg, normed, "qkv")
        attention = merge_heads(attend(q, k, v, valid))
        x = gated(x, gate_attention, nn.Dense(cfg.width, name="out")(attention))
        normed = nn.LayerNorm(1e-6, use_fast_variance=False, name="norm2")(x)
        hidden = nn.silu(nn.Dense(4 * cfg.width, name="mlp_in")(normed))
        return gated(x, gate_mlp, nn.Dense(cfg.width, name="mlp_out")(divide_columns(hidden)))


class DoubleBlock(nn.Module):
    """Image and text stream with separate weights and one joint attention."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        vec: jax.Array,
        rope: Table,
        valid: jax.Array,
        masked: jax.Array | None = None,
        frames: TargetFrames | None = None,
    ) -> Streams:
        cfg = self.cfg
        img, txt = streams
        parts = {name: _modulation(cfg, vec, 6, f"{name}_mod") for name in ("img", "txt")}

        def project(name: str, x: jax.Array) -> list[jax.Array]:
            shift, scale = parts[name][:2]
            q, k, v = _qkv(cfg, modulate(x, shift, scale), f"{name}_qkv")
            return [_head_norm(q, f"{name}_q_norm"), _head_norm(k, f"{name}_k_norm"), v]

        def finish(name: str, x: jax.Array, attention: jax.Array) -> jax.Array:
            _, _, gate_attention, shift, scale, gate_mlp = parts[name]
            attention = merge_heads(attention)
            x = gated(x, gate_attention, nn.Dense(cfg.width, name=f"{name}_out")(attention))
            hidden = _mlp_in(cfg, modulate(x, shift, scale), f"{name}_mlp_in")
            return gated(x, gate_mlp, nn.Dense(cfg.width, name=f"{name}_mlp_out")(hidden))

        both = zip(project("img", img), project("txt", txt), strict=True)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in both)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        attention = attend_by_frame(q, k, v, valid, masked, frames)
        length = img.shape[1]
        return finish("img", img, attention[:, :length]), finish("txt", txt, attention[:, length:])


class BlockInput(nn.Module):
    """Modulated input of a double block's image stream, with the parameters of that block."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, img: jax.Array, vec: jax.Array) -> jax.Array:
        shift, scale = _modulation(self.cfg, vec, 6, "img_mod")[:2]
        return modulate(img, shift, scale)


class SingleBlock(nn.Module):
    """One stream; attention and feed-forward in parallel from one norm."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        vec: jax.Array,
        rope: Table,
        valid: jax.Array,
        masked: jax.Array | None = None,
        frames: TargetFrames | None = None,
    ) -> jax.Array:
        cfg = self.cfg
        shift, scale, gate = _modulation(cfg, vec, 3, "mod")
        normed = modulate(x, shift, scale)
        q, k, v = _qkv(cfg, normed, "qkv")
        q, k = _head_norm(q, "q_norm"), _head_norm(k, "k_norm")
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        attention = merge_heads(attend_by_frame(q, k, v, valid, masked, frames))
        hidden = _mlp_in(cfg, normed, "mlp_in")
        out = nn.Dense(cfg.width, use_bias=False, name="attn_out")(attention)
        return gated(x, gate, out + nn.Dense(cfg.width, name="mlp_out")(hidden))


class Head(nn.Module):
    """Final modulated norm and projection to patches, in float32 at full matmul precision."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, vec: jax.Array) -> jax.Array:
        highest = jax.lax.Precision.HIGHEST
        vec = nn.silu(vec.astype(jnp.float32))
        mod = nn.Dense(2 * self.cfg.width, precision=highest, name="mod")(vec)
        scale, shift = jnp.split(constrain(mod, BATCH, None)[:, None, :], 2, axis=-1)
        x = modulate(x.astype(jnp.float32), shift, scale)
        return nn.Dense(4 * self.cfg.out_channels, precision=highest, name="out")(x)


def _qkv(cfg: TransformerConfig, x: jax.Array, name: str) -> list[jax.Array]:
    """Fused projection -> q, k, v, each (B, L, N, head_dim)."""
    fused = nn.DenseGeneral((3, cfg.heads, cfg.head_dim), name=name)(x)
    # Each device projects its own tokens; then one all-to-all for all three gives it every token of
    # its heads, so that joining the streams needs no further exchange.
    fused = to_heads(constrain(fused, BATCH, TOKENS, None, "tensor", None))
    return [fused[:, :, i] for i in range(3)]


def _mlp_in(cfg: TransformerConfig, x: jax.Array, name: str) -> jax.Array:
    hidden = nn.Dense(int(cfg.mlp_ratio * cfg.width), name=name)(x)
    return divide_columns(nn.gelu(hidden, approximate=True))


def _head_norm(x: jax.Array, name: str) -> jax.Array:
    """RMS norm of each head's vector."""
    return nn.RMSNorm(1e-6, name=name)(x)


def _modulation(cfg: TransformerConfig, vec: jax.Array, parts: int, name: str) -> list[jax.Array]:
    """`parts` vectors (B, 1, D) in float32: shift, scale, gate, ..."""
    # Gathered before it is split: the parts do not end at the boundaries of the shards.
    out = constrain(nn.Dense(parts * cfg.width, name=name)(nn.silu(vec)), BATCH, None)
    return jnp.split(out.astype(jnp.float32)[:, None, :], parts, axis=-1)
