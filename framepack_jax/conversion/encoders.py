"""Tables of the encoders: Llama, UMT5, CLIP's text model, SigLIP's vision model.

Source: the state dicts of transformers' `LlamaModel`, `UMT5EncoderModel`, `CLIPTextModel` and
`SiglipVisionModel`, bare or inside the models that wrap them (LLaVA, whole UMT5, whole CLIP, whole
SigLIP), and of UMT5 in Wan's release. transformers fills in the fields that `config.json` lacks. A
checkpoint without `config.json` must have the width of the released model, or of the model that it
replaces.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from framepack_jax.conversion.engine import Source, Table
from framepack_jax.conversion.transforms import (
    Patch,
    Row,
    Shape,
    each,
    embedding,
    kernel,
    linear,
    norm,
)
from framepack_jax.conversion.weight_files import ConversionError, make_config, reading_shapes
from framepack_jax.models.encoders import clip, llama, siglip, umt5

# Number of last layers of Llama, whose output FramePack does not use.
UNUSED_LAYERS = 2
# Activation in transformers -> key of `encoder_block.ACTIVATIONS`.
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _llama_rows(cfg: llama.LlamaConfig) -> list[Row]:
    here, there = "layers/{i}", "layers.{i}"
    dense = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    return [
        *embedding("embed", "embed_tokens"),
        *norm(f"{here}/input_norm", f"{there}.input_layernorm", bias=False),
        *norm(f"{here}/mlp_norm", f"{there}.post_attention_layernorm", bias=False),
        *[
            row
            for ours, theirs in dense.items()
            for row in linear(f"{here}/{ours}", f"{there}.{theirs}", bias=False)
        ],
    ]


def _llama_config(source: Source) -> llama.LlamaConfig:
    config = _transformers_config(source, "text_config", "llama")
    if config is None:
        with reading_shapes(source.checkpoint.path):
            vocabulary, width = source.shape("embed_tokens.weight")
            keys = source.shape("layers.{i}.self_attn.k_proj.weight")[0]
            known = source.known_config(llama.LlamaConfig(), "width", width)
            return _sized(
                source,
                known,
                vocab_size=vocabulary,
                layers=source.count("layers.{i}.input_layernorm.weight") - UNUSED_LAYERS,
                kv_heads=keys // known.head_dim,
                mlp_width=source.shape("layers.{i}.mlp.gate_proj.weight")[0],
            )
    rope = config.rope_parameters
    fields = {**config.to_dict(), "rope_type": rope.get("rope_type", "default")}
    supported = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_type": "default",
    }  # fmt: skip
    source.require(fields, supported)
    return _config(
        source,
        llama.LlamaConfig,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers - UNUSED_LAYERS,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mlp_width=config.intermediate_size,
        rope_theta=float(rope["rope_theta"]),
        norm_eps=config.rms_norm_eps,
    )


def _llama_ignored_keys(cfg: llama.LlamaConfig) -> tuple[str, ...]:
    unused = "|".join(str(cfg.layers + i) for i in range(UNUSED_LAYERS))
    return (
        rf"^layers\.({unused})\.",
        r"^norm\.weight$",
        r"rotary_emb\.inv_freq$",
    )


# Modules of UMT5 -> their names in transformers (ComfyUI has the same) and in Wan's release.
UMT5_NAMES = {
    "embed": "shared",
    "layers/{i}/attention_norm": "encoder.block.{i}.layer.0.layer_norm",
    "layers/{i}/q": "encoder.block.{i}.layer.0.SelfAttention.q",
    "layers/{i}/k": "encoder.block.{i}.layer.0.SelfAttention.k",
    "layers/{i}/v": "encoder.block.{i}.layer.0.SelfAttention.v",
    "layers/{i}/position_bias": "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias",
    "layers/{i}/out": "encoder.block.{i}.layer.0.SelfAttention.o",
    "layers/{i}/mlp_norm": "encoder.block.{i}.layer.1.layer_norm",
    "layers/{i}/gate": "encoder.block.{i}.layer.1.DenseReluDense.wi_0",
    "layers/{i}/up": "encoder.block.{i}.layer.1.DenseReluDense.wi_1",
    "layers/{i}/down": "encoder.block.{i}.layer.1.DenseReluDense.wo",
    "final_norm": "encoder.final_layer_norm",
}
UMT5_WAN_NAMES = {
    "embed": "token_embedding",
    "layers/{i}/attention_norm": "blocks.{i}.norm1",
    "layers/{i}/q": "blocks.{i}.attn.q",
    "layers/{i}/k": "blocks.{i}.attn.k",
    "layers/{i}/v": "blocks.{i}.attn.v",
    "layers/{i}/position_bias": "blocks.{i}.pos_embedding.embedding",
    "layers/{i}/out": "blocks.{i}.attn.o",
    "layers/{i}/mlp_norm": "blocks.{i}.norm2",
    "layers/{i}/gate": "blocks.{i}.ffn.gate.0",
    "layers/{i}/up": "blocks.{i}.ffn.fc1",
    "layers/{i}/down": "blocks.{i}.ffn.fc2",
    "final_norm": "norm",
}


def _umt5_rows(names: Mapping[str, str], cfg: umt5.Umt5Config) -> list[Row]:
    rows = []
    for ours, theirs in names.items():
        if ours.endswith("norm"):
            rows += norm(ours, theirs, bias=False)
        elif ours.endswith(("embed", "position_bias")):
            rows += embedding(ours, theirs)
        else:
            rows += linear(ours, theirs, bias=False)
    return rows


def _umt5_config(source: Source) -> umt5.Umt5Config:
    config = _transformers_config(source, "text_config", "umt5")
    if config is None:
        return _umt5_sizes(UMT5_NAMES, source)
    # transformers derives `is_gated_act` and `dense_act_fn` from this field.
    source.require(config.to_dict(), {"feed_forward_proj": "gated-gelu"})
    return _config(
        source,
        umt5.Umt5Config,
        vocab_size=config.vocab_size,
        width=config.d_model,
        layers=config.num_layers,
        heads=config.num_heads,
        head_dim=config.d_kv,
        mlp_width=config.d_ff,
        buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        norm_eps=config.layer_norm_epsilon,
    )


def _umt5_wan_config(source: Source) -> umt5.Umt5Config:
    """The `config.json` beside the release's file is the transformer's."""
    if (source.config_json() or {}).get("model_type") == "umt5":
        return _umt5_config(source)
    return _umt5_sizes(UMT5_WAN_NAMES, source)


def _umt5_sizes(names: Mapping[str, str], source: Source) -> umt5.Umt5Config:
    """Return a known config with the sizes found in shapes."""

    def shape(name: str) -> Shape:
        return source.shape(f"{names[name]}.weight")

    with reading_shapes(source.checkpoint.path):
        vocabulary, width = shape("embed")
        buckets, heads = shape("layers/{i}/position_bias")
        return _sized(
            source,
            source.known_config(umt5.Umt5Config(), "width", width),
            vocab_size=vocabulary,
            layers=source.count(f"{names['layers/{i}/q']}.weight"),
            heads=heads,
            head_dim=shape("layers/{i}/q")[0] // heads,
            mlp_width=shape("layers/{i}/up")[0],
            buckets=buckets,
        )


def _umt5_ignored_keys(cfg: umt5.Umt5Config) -> tuple[str, ...]:
    # The shared table under a second name, the decoder, and ComfyUI's tokenizer.
    return (r"^encoder\.embed_tokens\.weight$", r"^decoder\.", r"^lm_head\.", r"^spiece_model$")


def _block_rows(target: str, source: str) -> list[Row]:
    """Return rows for a layer of CLIP or SigLIP."""
    return [
        *norm(f"{target}/norm1", f"{source}.layer_norm1"),
        *linear(f"{target}/qkv", each(f"{source}.self_attn.*_proj")),
        *linear(f"{target}/out", f"{source}.self_attn.out_proj"),
        *norm(f"{target}/norm2", f"{source}.layer_norm2"),
        *linear(f"{target}/mlp_in", f"{source}.mlp.fc1"),
        *linear(f"{target}/mlp_out", f"{source}.mlp.fc2"),
    ]


def _clip_rows(cfg: clip.ClipConfig) -> list[Row]:
    return [
        *embedding("token_embedding", "embeddings.token_embedding"),
        *embedding("position_embedding", "embeddings.position_embedding"),
        *_block_rows("layers/{i}", "encoder.layers.{i}"),
        *norm("final_norm", "final_layer_norm"),
    ]


def _clip_config(source: Source) -> clip.ClipConfig:
    config = _transformers_config(source, "text_config", "clip_text_model")
    if config is None:
        with reading_shapes(source.checkpoint.path):
            vocabulary, width = source.shape("embeddings.token_embedding.weight")
            return _sized(
                source,
                source.known_config(clip.ClipConfig(), "width", width),
                vocab_size=vocabulary,
                max_tokens=source.shape("embeddings.position_embedding.weight")[0],
                layers=source.count("encoder.layers.{i}.layer_norm1.weight"),
                mlp_width=source.shape("encoder.layers.{i}.mlp.fc1.bias")[0],
            )
    return _config(
        source,
        clip.ClipConfig,
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings,
        eos_token_id=config.eos_token_id,
        **_block_sizes(source, config),
    )


def _clip_ignored_keys(cfg: clip.ClipConfig) -> tuple[str, ...]:
    return (r"position_ids$",)


def _siglip_rows(cfg: siglip.SiglipConfig) -> list[Row]:
    patch = Patch((cfg.patch_size, cfg.patch_size))
    return [
        *kernel("patch", "embeddings.patch_embedding", patch),
        *embedding("position_embedding", "embeddings.position_embedding"),
        *_block_rows("layers/{i}", "encoder.layers.{i}"),
        *norm("final_norm", "post_layernorm"),
    ]


def _siglip_config(source: Source) -> siglip.SiglipConfig:
    config = _transformers_config(source, "vision_config", "siglip_vision_model")
    if config is None:
        with reading_shapes(source.checkpoint.path):
            width, _, patch_size, _ = source.shape("embeddings.patch_embedding.weight")
            return _sized(
                source,
                source.known_config(siglip.SiglipConfig(), "width", width),
                patch_size=patch_size,
                layers=source.count("encoder.layers.{i}.layer_norm1.weight"),
                mlp_width=source.shape("encoder.layers.{i}.mlp.fc1.bias")[0],
            )
    return _config(
        source,
        siglip.SiglipConfig,
        image_size=config.image_size,
        patch_size=config.patch_size,
        channels=config.num_channels,
        **_block_sizes(source, config),
    )


def _siglip_ignored_keys(cfg: siglip.SiglipConfig) -> tuple[str, ...]:
    return (r"^head\.", r"position_ids$")


def _block_sizes(source: Source, config: Any) -> dict[str, Any]:
    if str(config.hidden_act) not in ACTIVATIONS:
        raise ConversionError(
            f"{source.checkpoint.path}: config.json has hidden_act = {config.hidden_act!r};"
            f" supported are {', '.join(ACTIVATIONS)}"
        )
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "mlp_width": config.intermediate_size,
        "norm_eps": config.layer_norm_eps,
        "activation": ACTIVATIONS[config.hidden_act],
    }


def _transformers_config(source: Source, part: str, model_type: str) -> Any | None:
    """Return the config beside a checkpoint, or its `part` if it is of a larger model."""
    folder = source.checkpoint.folder
    if source.config_json() is None:
        return None
    from transformers import AutoConfig  # takes seconds, with torch installed

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types, by what is wrong in the file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"{folder}/config.json is no config of a {source.table.description} ({reason})"
        ) from error
    config = getattr(config, part, config)
    if config.model_type != model_type:
        raise ConversionError(
            f"{folder}/config.json is of model type {config.model_type!r}; a"
            f" {source.table.description} is {model_type!r}"
        )
    return config


def _config(source: Source, config_class: type, **values: Any) -> Any:
    return make_config(source.checkpoint.folder / "config.json", config_class, **values)


def _sized(source: Source, known: Any, **sizes: int) -> Any:
    """Return a known config with the sizes found in shapes."""
    return make_config(source.checkpoint.path, type(known), **dataclasses.asdict(known) | sizes)


LLAMA = Table(
    kind="llama",
    description="Llama text model",
    detect_key="embed_tokens.weight",
    rows=_llama_rows,
    config=_llama_config,
    ignored_keys=_llama_ignored_keys,
)
UMT5 = Table(
    kind="umt5",
    description="UMT5 text encoder",
    # T5 has such a bias in its first layer only.
    detect_key="encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
    rows=functools.partial(_umt5_rows, UMT5_NAMES),
    config=_umt5_config,
    ignored_keys=_umt5_ignored_keys,
)
UMT5_WAN = Table(
    kind="umt5",
    description="UMT5 text encoder in Wan's naming",
    detect_key="blocks.0.pos_embedding.embedding.weight",
    rows=functools.partial(_umt5_rows, UMT5_WAN_NAMES),
    config=_umt5_wan_config,
)
CLIP = Table(
    kind="clip_text",
    description="CLIP text model",
    detect_key="embeddings.token_embedding.weight",
    # SigLIP's text model.
    stranger="head.weight",
    rows=_clip_rows,
    config=_clip_config,
    ignored_keys=_clip_ignored_keys,
)
SIGLIP = Table(
    kind="siglip_vision",
    description="SigLIP vision model",
    # CLIP's vision model has no such bias.
    detect_key="embeddings.patch_embedding.bias",
    rows=_siglip_rows,
    config=_siglip_config,
    ignored_keys=_siglip_ignored_keys,
)
