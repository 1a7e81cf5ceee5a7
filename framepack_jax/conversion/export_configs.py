"""`config.json` of exported networks, as diffusers and transformers read it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from framepack_jax.bundle import Manifest
from framepack_jax.conversion import encoders, transformer, wan_transformer
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models.encoders import clip, siglip, umt5
from framepack_jax.models.hunyuan.config import TransformerConfig, VaeConfig
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.models.wan.vae_config import WanVaeConfig

RELEASED = WanConfig()
# Fields of networks with context.
CONTEXT_SWITCHES = ("clean_context", "prompt_to_target", "context_key_scale")
# The kernels that diffusers' FramePack and Helios models embed context with.
DIFFUSERS_KERNELS = tuple(transformer.CONTEXT_NAMES)


def _transformer_config(cfg: TransformerConfig, manifest: Manifest) -> dict[str, Any]:
    fields = {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.head_dim,
        "num_layers": cfg.double_layers,
        "num_single_layers": cfg.single_layers,
        "num_refiner_layers": cfg.refiner_layers,
        "mlp_ratio": cfg.mlp_ratio,
        "patch_size": 2,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "guidance_embeds": cfg.guidance,
        "text_embed_dim": cfg.text_dim,
        "pooled_projection_dim": cfg.pooled_dim,
        "rope_theta": cfg.rope_theta,
        "rope_axes_dim": list(cfg.rope_axes),
    }
    if not cfg.context_kernels and cfg.image_dim is None:
        return fields
    if cfg.context_kernels:
        _check_all_kernels(cfg.context_kernels)
    return fields | {
        "_class_name": "HunyuanVideoFramepackTransformer3DModel",
        "has_image_proj": cfg.image_dim is not None,
        "image_proj_dim": cfg.image_dim or TransformerConfig().image_dim,
        "has_clean_x_embedder": bool(cfg.context_kernels),
    }


def _wan_config(cfg: WanConfig, manifest: Manifest) -> dict[str, Any]:
    fields = {
        "patch_size": [1, 2, 2],
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.head_dim,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "text_dim": cfg.text_dim,
        "freq_dim": cfg.time_dim,
        "ffn_dim": cfg.mlp_dim,
        "num_layers": cfg.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": cfg.norm_eps,
        "added_kv_proj_dim": None,
    }
    if cfg.context_kernels:
        _check_all_kernels(cfg.context_kernels)
        scales = {ours: theirs for theirs, ours in wan_transformer.KEY_SCALES.items()}
        return fields | {
            "_class_name": "HeliosTransformer3DModel",
            "rope_dim": list(cfg.rope_axes),
            "rope_theta": cfg.rope_theta,
            "guidance_cross_attn": cfg.prompt_to_target,
            "zero_history_timestep": cfg.clean_context,
            "has_multi_term_memory_patch": True,
            "is_amplify_history": cfg.context_key_scale in scales,
            "history_scale_mode": scales.get(cfg.context_key_scale, "per_head"),
        }
    standard = dataclasses.replace(
        cfg, rope_axes=wan_transformer.rope_axes(cfg.head_dim), rope_theta=RELEASED.rope_theta,
        **{name: getattr(RELEASED, name) for name in CONTEXT_SWITCHES},
    )  # fmt: skip
    if cfg != standard:
        raise ConversionError(
            f"the transformer embeds no context and has settings that diffusers' Wan model lacks"
            f" ({cfg}); expected {standard}: export a single file"
        )
    return fields | {
        "_class_name": "WanTransformer3DModel",
        "image_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def _check_all_kernels(kernels: tuple[str, ...]) -> None:
    """Raise ConversionError unless context is embedded as diffusers' models do."""
    if kernels != DIFFUSERS_KERNELS:
        raise ConversionError(
            f"the transformer embeds context with {', '.join(kernels)}; diffusers' model has"
            f" {', '.join(DIFFUSERS_KERNELS)}, all or none: export a single file"
        )


def _vae_config(cfg: VaeConfig, manifest: Manifest) -> dict[str, Any]:
    if set(manifest.latent_mean) - {0.0} or len(set(manifest.latent_std)) != 1:
        raise ConversionError(
            "the bundle normalises latents by channel; diffusers' VAE knows one scaling factor"
            " for all, so that it cannot go out as a folder: export a single file"
        )
    blocks = len(cfg.channels)
    return {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "latent_channels": cfg.latent_channels,
        "down_block_types": ["HunyuanVideoDownBlock3D"] * blocks,
        "up_block_types": ["HunyuanVideoUpBlock3D"] * blocks,
        "block_out_channels": list(cfg.channels),
        "layers_per_block": cfg.layers_per_block,
        "act_fn": "silu",
        "norm_num_groups": cfg.norm_groups,
        # The reciprocal of a reciprocal; its last digit is rounding.
        "scaling_factor": float(f"{1 / manifest.latent_std[0]:.12g}"),
        "spatial_compression_ratio": cfg.space_compression,
        "temporal_compression_ratio": cfg.time_compression,
        "mid_block_add_attention": True,
    }


def _wan_vae_config(cfg: WanVaeConfig, manifest: Manifest) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLWan",
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "z_dim": cfg.latent_channels,
        "base_dim": cfg.width,
        "decoder_base_dim": None,
        "dim_mult": list(cfg.multipliers),
        "num_res_blocks": cfg.layers_per_block,
        "temperal_downsample": list(cfg.halves_time),
        "attn_scales": [],
        "dropout": 0.0,
        "is_residual": False,
        "patch_size": None,
        "latents_mean": list(manifest.latent_mean),
        "latents_std": list(manifest.latent_std),
        "scale_factor_spatial": cfg.space_compression,
        "scale_factor_temporal": cfg.time_compression,
    }


def _block_config(cfg: clip.ClipConfig | siglip.SiglipConfig) -> dict[str, Any]:
    theirs = {ours: theirs for theirs, ours in encoders.ACTIVATIONS.items()}
    return {
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_act": theirs[cfg.activation],
    }


def _clip_config(cfg: clip.ClipConfig, manifest: Manifest) -> dict[str, Any]:
    return _block_config(cfg) | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_tokens,
        "eos_token_id": cfg.eos_token_id,
    }


def _siglip_config(cfg: siglip.SiglipConfig, manifest: Manifest) -> dict[str, Any]:
    """A bundle has no pooling head, and the model says so."""
    return _block_config(cfg) | {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "num_channels": cfg.channels,
        "vision_use_head": False,
    }


def _umt5_config(cfg: umt5.Umt5Config, manifest: Manifest) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": cfg.vocab_size,
        "d_model": cfg.width,
        "d_kv": cfg.head_dim,
        "d_ff": cfg.mlp_width,
        "num_layers": cfg.layers,
        "num_decoder_layers": cfg.layers,
        "num_heads": cfg.heads,
        "relative_attention_num_buckets": cfg.buckets,
        "relative_attention_max_distance": cfg.max_distance,
        "layer_norm_epsilon": cfg.norm_eps,
        "feed_forward_proj": "gated-gelu",
    }


# By kind of network.
CONFIGS: dict[str, Callable[[Any, Manifest], dict[str, Any]]] = {
    "hunyuan_packed_dit": _transformer_config,
    "wan_packed_dit": _wan_config,
    "hunyuan_vae": _vae_config,
    "wan_vae": _wan_vae_config,
    "umt5": _umt5_config,
    "clip_text": _clip_config,
    "siglip_vision": _siglip_config,
}
