"""CLIP's text model: one vector for a prompt.

Source: CLIP (arXiv 2103.00020); the pooled position follows Hugging Face transformers'
CLIPTextModel. The defaults are those of CLIP-L (openai/clip-vit-large-patch14).

Shapes: B batch, L tokens, D width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from framepack_jax.models import scan
from framepack_jax.models.encoders.block import EncoderBlock, layer_norm
from framepack_jax.models.network_spec import NetworkSpec
from framepack_jax.models.params import Params, apply_module
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.sizes import Layers, Positive, Size

STACKS = {"layers": "layers"}
# Attention is not divided over `tensor`: with 12 heads, no network could use tensor=8.
SHARDINGS = (
    (r"token_embedding/embedding", (None, "fsdp")),
    (r"position_embedding/embedding", ()),
    (r"layers/qkv/kernel", (None, "fsdp", None, None, None)),
    (r"layers/qkv/bias", ()),
    (r"layers/mlp_in/kernel", (None, "fsdp", "tensor")),
    (r"layers/mlp_in/bias", (None, "tensor")),
    (r"layers/mlp_out/kernel", (None, "tensor", "fsdp")),
    (r"layers/out/kernel", (None, None, "fsdp")),
    (r"layers/(out|mlp_out)/bias", ()),
    (r"(layers/norm\d|final_norm)/(scale|bias)", ()),
)
# Configs older than the fix of their end-of-text id say 2, an id that the tokenizer never makes.
LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of the network; `activation` is a key of `block.ACTIVATIONS`."""

    vocab_size: Size = 49408
    width: Size = 768
    layers: Layers = 12
    heads: Size = 12
    mlp_width: Size = 3072
    max_tokens: Size = 77
    norm_eps: Positive = 1e-5
    activation: str = "quick_gelu"
    eos_token_id: Size = LEGACY_EOS


def pooled(cfg: ClipConfig, params: Params, ids: jax.Array) -> jax.Array:
    """Return the final state (B, D) at the end of text of token ids (B, L), L <= `max_tokens`.

    Attention is causal, so the end of text does not see the padding behind it, which needs no mask.
    Computes in the dtype of the embedding table.
    """
    positions = params["position_embedding"]["embedding"][: ids.shape[1]]
    x = params["token_embedding"]["embedding"][ids] + positions[None, :, :]
    x = scan.run(EncoderBlock(cfg), params["layers"], x, True)
    x = x[jnp.arange(ids.shape[0]), end_of_text(cfg, ids)]
    return apply_module(layer_norm(cfg), cast_params(params["final_norm"], x.dtype), x)


def end_of_text(cfg: ClipConfig, ids: jax.Array) -> jax.Array:
    """Return the position (B,) of the pooled token: the first end-of-text id, or with a legacy
    config the largest id."""
    if cfg.eos_token_id == LEGACY_EOS:
        return jnp.argmax(ids, axis=-1)
    return jnp.argmax(ids == cfg.eos_token_id, axis=-1)


def init(cfg: ClipConfig, key: jax.Array) -> Params:
    """Draw random parameters, layers stacked."""
    token, position, layers, norm = jax.random.split(key, 4)
    ids, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, cfg.width))
    return {
        "token_embedding": nn.Embed(cfg.vocab_size, cfg.width).init(token, ids)["params"],
        "position_embedding": nn.Embed(cfg.max_tokens, cfg.width).init(position, ids)["params"],
        "layers": scan.init(EncoderBlock(cfg), layers, cfg.layers, x, True),
        "final_norm": layer_norm(cfg).init(norm, x)["params"],
    }


SPEC = NetworkSpec(
    kind="clip_text",
    config=ClipConfig,
    init=init,
    sharding_rules=SHARDINGS,
    stacks=STACKS,
)
