"""CLIP's text model: the one vector that sums a prompt up.

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
from framepack_jax.models.params import Params
from framepack_jax.models.quantization import cast_params
from framepack_jax.models.sizes import Layers, Positive, Size
from framepack_jax.models.spec import NetworkSpec

STACKS = {"layers": "layers"}
# Attention is not divided over `tensor`: 12 heads would forbid tensor=8 to all other networks.
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
# Configs older than the fix of their end-of-text id say 2, which is not what the tokenizer makes.
LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of the network; `activation` is a key of `encoder_block.ACTIVATIONS`."""

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
    """Token ids (B, L), L at most `max_tokens` -> the final state at the end of text (B, D).

    Attention is causal, so the padding behind the end of text cannot be seen from there and needs
    no mask. Computes in the dtype of the embedding table.
    """
    positions = params["position_embedding"]["embedding"][: ids.shape[1]]
    x = params["token_embedding"]["embedding"][ids] + positions[None, :, :]
    x = scan.run(EncoderBlock(cfg), params["layers"], x, True)
    x = x[jnp.arange(ids.shape[0]), end_of_text(cfg, ids)]
    return layer_norm(cfg).apply({"params": cast_params(params["final_norm"], x.dtype)}, x)


def end_of_text(cfg: ClipConfig, ids: jax.Array) -> jax.Array:
    """Position (B,) of the pooled token: the first end-of-text id, or the largest id of all where
    the config is of the legacy kind."""
    if cfg.eos_token_id == LEGACY_EOS:
        return jnp.argmax(ids, axis=-1)
    return jnp.argmax(ids == cfg.eos_token_id, axis=-1)


def init(cfg: ClipConfig, key: jax.Array) -> Params:
    """Random parameters, layers stacked."""
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
