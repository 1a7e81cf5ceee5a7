"""UMT5's encoder: a state for each token of a prompt.

Source: UMT5 (arXiv 2304.09151), as in Hugging Face transformers' UMT5EncoderModel: T5 v1.1 with a
relative position bias in every layer. Attention scores are not scaled, and no layer has a bias.

Shapes: B batch, L tokens, N heads, d head width, D width.
"""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from framepack_jax.models import scan
from framepack_jax.models.network_spec import TextEncoderSpec
from framepack_jax.models.params import Params, apply_module
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.sizes import Layers, Positive, Size
from framepack_jax.utils.text import clean_prompt

STACKS = {"layers": "layers"}
OFFLOADABLE = ("layers",)
# Megatron's pairs, with `fsdp` on the remaining dimension. The table of embeddings is divided by
# width, so that every device looks up every token.
SHARDINGS = (
    (r"embed/embedding", (None, ("tensor", "fsdp"))),
    (r"layers/[qkv]/kernel", (None, "fsdp", "tensor", None)),
    (r"layers/position_bias/embedding", (None, None, "tensor")),
    (r"layers/(gate|up)/kernel", (None, "fsdp", "tensor")),
    (r"layers/(out|down)/kernel", (None, "tensor", "fsdp")),
    (r"(layers/\w+_norm|final_norm)/scale", ()),
)


@dataclasses.dataclass(frozen=True)
class Umt5Config:
    """Sizes of the network, by default those of UMT5-XXL.

    `buckets` is the number of position biases of a head: one half for tokens in front, one half for
    those behind. All distances from `max_distance` on share one.
    """

    vocab_size: Size = 256384
    width: Size = 4096
    layers: Layers = 24
    heads: Size = 64
    head_dim: Size = 64
    mlp_width: Size = 10240
    buckets: Size = 32
    max_distance: Size = 128
    norm_eps: Positive = 1e-6

    def __post_init__(self) -> None:
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"{self.buckets} buckets and max_distance {self.max_distance}: expected a multiple"
                " of 4 buckets, and a distance above a quarter of them"
            )


def hidden_states(cfg: Umt5Config, params: Params, ids: jax.Array, valid: jax.Array) -> jax.Array:
    """Encode token ids (B, L) to states (B, L, D) after the final norm.

    `valid` (B, L) is True for tokens that may be read, at least one a row; rows of others are
    meaningless. Computes in the dtype of the embedding table, float16 in float32.
    """
    return hidden_states_of_each(cfg, params, [(ids, valid)])[0]


def hidden_states_of_each(
    cfg: Umt5Config,
    params: Params,
    inputs: Sequence[tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]],
) -> list[jax.Array]:
    """Encode several (ids, valid), each as if it were alone; copy each offloaded layer once."""
    embedding = params["embed"]["embedding"]
    # The stream grows beyond float16 in the released weights.
    dtype = jnp.float32 if embedding.dtype == jnp.float16 else embedding.dtype
    each = [
        (embedding[ids].astype(dtype), jnp.asarray(position_buckets(cfg, ids.shape[1])), valid)
        for ids, valid in inputs
    ]
    states = scan.run_each(Block(cfg), params["layers"], each)
    norm = cast_params(params["final_norm"], dtype)
    return [apply_module(_norm(cfg), norm, x).astype(embedding.dtype) for x in states]


def position_buckets(cfg: Umt5Config, length: int) -> np.ndarray:
    """Return the bucket (L, L) int32 of each query's distance to each key.

    Half of a side's buckets hold one distance each; the others grow with it. In float32, as the
    reference computes them: a distance at the border of two buckets falls into the same.
    """
    side = cfg.buckets // 2
    exact = side // 2
    distances = np.arange(length)
    ratio = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(cfg.max_distance / exact)) * np.float32(side - exact)
    far = np.minimum(exact + ratio.astype(np.int32), side - 1)
    buckets = np.where(distances < exact, distances, far)
    offset = distances[None, :] - distances[:, None]
    return (buckets[np.abs(offset)] + side * (offset > 0)).astype(np.int32)


def init(cfg: Umt5Config, key: jax.Array) -> Params:
    """Draw random parameters, layers stacked."""
    embed, layers, norm = jax.random.split(key, 3)
    ids, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, cfg.width))
    return {
        "embed": nn.Embed(cfg.vocab_size, cfg.width).init(embed, ids)["params"],
        "layers": scan.init(Block(cfg), layers, cfg.layers, x, ids, jnp.ones((1, 1), bool)),
        "final_norm": _norm(cfg).init(norm, x)["params"],
    }


class Block(nn.Module):
    """Attention with a bias by distance, then a gated feed-forward."""

    cfg: Umt5Config

    @nn.compact
    def __call__(self, x: jax.Array, buckets: jax.Array, valid: jax.Array) -> jax.Array:
        cfg = self.cfg
        normed = _norm(cfg, "attention_norm")(x)
        q, k, v = (
            nn.DenseGeneral((cfg.heads, cfg.head_dim), use_bias=False, name=name)(normed)
            for name in "qkv"
        )
        bias = nn.Embed(cfg.buckets, cfg.heads, name="position_bias")(buckets)
        attention = _attend(q, k, v, bias, valid)
        x += self.dense(cfg.width, "out", rearrange(attention, "b l n d -> b l (n d)"))
        normed = _norm(cfg, "mlp_norm")(x)
        gate = nn.gelu(self.dense(cfg.mlp_width, "gate", normed), approximate=True)
        hidden = gate * self.dense(cfg.mlp_width, "up", normed)
        return x + self.dense(cfg.width, "down", hidden)

    def dense(self, width: int, name: str, x: jax.Array) -> jax.Array:
        return nn.Dense(width, use_bias=False, name=name)(x)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, valid: jax.Array
) -> jax.Array:
    """Compute softmax(q k^T + bias) v of the valid keys, scores in float32.

    q, k, v are (B, L, N, d), `bias` is (L, L, N). Fused kernels take no such bias, and prompts are
    short: 512 tokens have 64 MiB of scores.
    """
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
    scores += rearrange(bias.astype(jnp.float32), "q k n -> 1 n q k")
    scores = jnp.where(valid[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bnqk,bknd->bqnd", nn.softmax(scores).astype(v.dtype), v)


def _norm(cfg: Umt5Config, name: str | None = None) -> nn.RMSNorm:
    return nn.RMSNorm(cfg.norm_eps, use_fast_variance=False, name=name)


SPEC = TextEncoderSpec(
    kind="umt5",
    config=Umt5Config,
    init=init,
    sharding_rules=SHARDINGS,
    stacks=STACKS,
    offloadable=OFFLOADABLE,
    hidden_states=hidden_states,
    hidden_states_of_each=hidden_states_of_each,
    clean=clean_prompt,
)
