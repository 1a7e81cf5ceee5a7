"""Llama as a text encoder: the hidden states of a layer before the last.

Source: Llama 3 (arXiv 2407.21783), as in Hugging Face transformers' LlamaModel. HunyuanVideo reads
the third hidden states from the end of a model of n layers, the output of layer n - 2. The last two
layers and the final norm are never computed and have no parameters here.

Shapes: B batch, L tokens, N heads, M key/value heads, d head width, D width.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from framepack_jax.models import scan
from framepack_jax.models.network_spec import TextEncoderSpec
from framepack_jax.models.params import Params
from framepack_jax.models.sizes import Layers, Positive, Size
from framepack_jax.ops.attention import attend

STACKS = {"layers": "layers"}
OFFLOADABLE = ("layers",)
# Megatron's pairs, with `fsdp` on the remaining dimension. The table of embeddings is divided by
# width, so that every device looks up every token.
SHARDINGS = (
    (r"embed/embedding", (None, ("tensor", "fsdp"))),
    (r"layers/[qkv]/kernel", (None, "fsdp", "tensor", None)),
    (r"layers/(gate|up)/kernel", (None, "fsdp", "tensor")),
    (r"layers/(out|down)/kernel", (None, "tensor", "fsdp")),
    (r"layers/\w+_norm/scale", ()),
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the network; `layers` counts those computed, two fewer than a checkpoint has."""

    vocab_size: Size = 128320
    width: Size = 4096
    layers: Layers = 30
    heads: Size = 32
    kv_heads: Size = 8
    head_dim: Size = 128
    mlp_width: Size = 14336
    rope_theta: Positive = 500000.0
    norm_eps: Positive = 1e-5


def hidden_states(cfg: LlamaConfig, params: Params, ids: jax.Array, valid: jax.Array) -> jax.Array:
    """Encode token ids (B, L) to states (B, L, D) after all blocks, not normalised.

    `valid` (B, L) is True for valid tokens, a prefix; rows behind it are meaningless. Computes in
    the dtype of the embedding table.
    """
    return hidden_states_of_each(cfg, params, [(ids, valid)])[0]


def hidden_states_of_each(
    cfg: LlamaConfig,
    params: Params,
    inputs: Sequence[tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]],
) -> list[jax.Array]:
    """Encode several (ids, valid), each as if it were alone; copy each offloaded layer once."""
    embedding = params["embed"]["embedding"]
    each = [(embedding[ids], _angles(cfg, ids.shape[1]), valid) for ids, valid in inputs]
    return scan.run_each(Block(cfg), params["layers"], each)


def init(cfg: LlamaConfig, key: jax.Array) -> Params:
    """Draw random parameters, layers stacked."""
    embed, layers = jax.random.split(key)
    ids, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, cfg.width))
    args = (x, _angles(cfg, 1), jnp.ones((1, 1), bool))
    return {
        "embed": nn.Embed(cfg.vocab_size, cfg.width).init(embed, ids)["params"],
        "layers": scan.init(Block(cfg), layers, cfg.layers, *args),
    }


class Block(nn.Module):
    """Causal grouped-query attention, then a gated feed-forward."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array, valid: jax.Array) -> jax.Array:
        cfg = self.cfg
        normed = self.norm(x, "input_norm")
        q, k, v = (
            nn.DenseGeneral((heads, cfg.head_dim), use_bias=False, name=name)(normed)
            for name, heads in (("q", cfg.heads), ("k", cfg.kv_heads), ("v", cfg.kv_heads))
        )
        attention = attend(_rotate(q, angles), _rotate(k, angles), v, valid, causal=True)
        x += self.dense(cfg.width, "out", rearrange(attention, "b l n d -> b l (n d)"))
        normed = self.norm(x, "mlp_norm")
        gate = nn.silu(self.dense(cfg.mlp_width, "gate", normed))
        hidden = gate * self.dense(cfg.mlp_width, "up", normed)
        return x + self.dense(cfg.width, "down", hidden)

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        return nn.RMSNorm(self.cfg.norm_eps, use_fast_variance=False, name=name)(x)

    def dense(self, width: int, name: str, x: jax.Array) -> jax.Array:
        return nn.Dense(width, use_bias=False, name=name)(x)


def _angles(cfg: LlamaConfig, length: int) -> jax.Array:
    """Return RoPE angles (L, d/2) of positions 0 .. L-1, float32."""
    frequencies = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    return jnp.asarray(np.outer(np.arange(length), frequencies), jnp.float32)


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate x (B, L, heads, d) by pairs (x[i], x[i + d/2]) in float32; return x's dtype."""
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


SPEC = TextEncoderSpec(
    kind="llama",
    config=LlamaConfig,
    init=init,
    sharding_rules=SHARDINGS,
    stacks=STACKS,
    offloadable=OFFLOADABLE,
    hidden_states=hidden_states,
    hidden_states_of_each=hidden_states_of_each,
)
