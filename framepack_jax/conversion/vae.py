"""Tables of the causal 3-D VAE in the naming of diffusers and Tencent, and in ComfyUI's.

Source: the state dicts of diffusers' `AutoencoderKLHunyuanVideo`, of Tencent's `pytorch_model.pt`
(same names with the prefix `vae.`, other names in `config.json`), and of ComfyUI's `AutoencoderKL`
(`comfy/ldm/modules/diffusionmodules/model.py` with `conv3d`). ComfyUI numbers the decoder's blocks
from the finest, and stores attention as 1x1x1 convolutions.
"""

import dataclasses
from typing import Any

from framepack_jax.conversion.engine import Source, Table
from framepack_jax.conversion.transforms import (
    Conv,
    Linear,
    Pointwise,
    Row,
    each,
    kernel,
    linear,
    norm,
)
from framepack_jax.conversion.weight_files import ConversionError, make_config, reading_shapes
from framepack_jax.models.hunyuan.config import VaeConfig

BLOCK_TYPES = {
    "HunyuanVideoDownBlock3D", "DownEncoderBlockCausal3D",
    "HunyuanVideoUpBlock3D", "UpDecoderBlockCausal3D",
}  # fmt: skip
RELEASED = VaeConfig()


def _diffusers_rows(cfg: VaeConfig) -> list[Row]:
    return [
        *_outer_rows("encoder.conv_norm_out", "decoder.conv_norm_out"),
        *_resnet("encoder/down_{i}/resnet_{j}", "encoder.down_blocks.{i}.resnets.{j}"),
        *_conv("encoder/down_{i}/downsample", "encoder.down_blocks.{i}.downsamplers.0.conv.conv"),
        *_diffusers_middle("encoder"),
        *_diffusers_middle("decoder"),
        *_resnet("decoder/up_{i}/resnet_{j}", "decoder.up_blocks.{i}.resnets.{j}"),
        *_conv("decoder/up_{i}/upsample", "decoder.up_blocks.{i}.upsamplers.0.conv.conv"),
    ]


def _diffusers_middle(half: str) -> list[Row]:
    attention, mid = f"{half}/mid/attention", f"{half}.mid_block"
    return [
        *_resnet(f"{half}/mid/resnet_{{j}}", f"{mid}.resnets.{{j}}"),
        *norm(f"{attention}/norm", f"{mid}.attentions.0.group_norm"),
        *linear(f"{attention}/qkv", each(f"{mid}.attentions.0.to_*")),
        *linear(f"{attention}/out", f"{mid}.attentions.0.to_out.0"),
    ]


def _comfyui_rows(cfg: VaeConfig) -> list[Row]:
    return [
        *_outer_rows("encoder.norm_out", "decoder.norm_out"),
        *_comfyui_resnet("encoder/down_{i}/resnet_{j}", "encoder.down.{i}.block.{j}"),
        *_conv("encoder/down_{i}/downsample", "encoder.down.{i}.downsample.conv.conv"),
        *_comfyui_middle("encoder"),
        *_comfyui_middle("decoder"),
        *[row for i in range(len(cfg.channels)) for row in _comfyui_up(cfg, i)],
    ]


def _comfyui_up(cfg: VaeConfig, block: int) -> list[Row]:
    up = f"decoder.up.{len(cfg.channels) - 1 - block}"
    return [
        *_comfyui_resnet(f"decoder/up_{block}/resnet_{{j}}", f"{up}.block.{{j}}"),
        *_conv(f"decoder/up_{block}/upsample", f"{up}.upsample.conv.conv"),
    ]


def _comfyui_middle(half: str) -> list[Row]:
    attention, mid = f"{half}/mid/attention", f"{half}.mid"
    return [
        *_comfyui_resnet(f"{half}/mid/resnet_0", f"{mid}.block_1"),
        *_comfyui_resnet(f"{half}/mid/resnet_1", f"{mid}.block_2"),
        *norm(f"{attention}/norm", f"{mid}.attn_1.norm"),
        *_pointwise(f"{attention}/qkv", each(f"{mid}.attn_1.*")),
        *_pointwise(f"{attention}/out", f"{mid}.attn_1.proj_out"),
    ]


def _comfyui_resnet(target: str, source: str) -> list[Row]:
    return _resnet(target, source, shortcut="nin_shortcut")


def _outer_rows(encoder_norm: str, decoder_norm: str) -> list[Row]:
    return [
        *_conv("encoder/conv_in", "encoder.conv_in.conv"),
        *norm("encoder/norm_out", encoder_norm),
        *_conv("encoder/conv_out", "encoder.conv_out.conv"),
        *_conv("encoder/quant", "quant_conv"),
        *_conv("decoder/post_quant", "post_quant_conv"),
        *_conv("decoder/conv_in", "decoder.conv_in.conv"),
        *norm("decoder/norm_out", decoder_norm),
        *_conv("decoder/conv_out", "decoder.conv_out.conv"),
    ]


def _resnet(target: str, source: str, shortcut: str = "conv_shortcut") -> list[Row]:
    return [
        *norm(f"{target}/norm1", f"{source}.norm1"),
        *_conv(f"{target}/conv1", f"{source}.conv1.conv"),
        *norm(f"{target}/norm2", f"{source}.norm2"),
        *_conv(f"{target}/conv2", f"{source}.conv2.conv"),
        *_conv(f"{target}/shortcut", f"{source}.{shortcut}.conv"),
    ]


def _conv(target: str, source: str) -> list[Row]:
    return kernel(target, source, Conv())


def _pointwise(target: str, sources: str | tuple[str, ...]) -> list[Row]:
    weight, bias = linear(target, sources)
    return [dataclasses.replace(weight, transform=Pointwise(Linear())), bias]


def _config(source: Source) -> VaeConfig:
    fields = source.config_json()
    return _config_from_shapes(source) if fields is None else _config_from_json(source, fields)


def _config_from_json(source: Source, fields: dict[str, Any]) -> VaeConfig:
    if "block_out_channels" not in fields:
        raise ConversionError(
            f"{source.checkpoint.folder}/config.json belongs to another model (it has no"
            " block_out_channels); replace it by the VAE's, or remove it"
        )
    source.require(fields, {"act_fn": "silu", "mid_block_add_attention": True})
    types = [fields.get(name) or () for name in ("down_block_types", "up_block_types")]
    blocks = {str(block) for named in types for block in (named if _is_list(named) else [named])}
    if unknown := sorted(blocks - BLOCK_TYPES):
        raise ConversionError(
            f"{source.checkpoint.path}: config.json has blocks {unknown}; supported are"
            f" {sorted(BLOCK_TYPES)}"
        )
    names = {
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "latent_channels": "latent_channels",
        "layers_per_block": "layers_per_block",
        "norm_num_groups": "norm_groups",
        "spatial_compression_ratio": "space_compression",
        "temporal_compression_ratio": "time_compression",
        "time_compression_ratio": "time_compression",
    }
    sizes = {ours: fields[theirs] for theirs, ours in names.items() if theirs in fields}
    channels = fields["block_out_channels"]
    return make_config(
        source.checkpoint.folder / "config.json",
        VaeConfig,
        **sizes,
        channels=tuple(channels) if _is_list(channels) else channels,
    )


def _config_from_shapes(source: Source) -> VaeConfig:
    rows = source.table.rows(RELEASED)
    tensor = {target: row.sources[0] for row in rows for target in row.targets}
    block = tensor["encoder/down_{i}/resnet_{j}/conv2/bias"].replace("{j}", "0")
    resnet = tensor["encoder/down_{i}/resnet_{j}/norm1/bias"].replace("{i}", "0")
    with reading_shapes(source.checkpoint.path):
        blocks = range(source.count(block))
        channels = tuple(source.shape(block.replace("{i}", str(i)))[0] for i in blocks)
        return make_config(
            source.checkpoint.path,
            VaeConfig,
            **dataclasses.asdict(source.known_config(RELEASED, "channels", channels))
            | {
                "in_channels": source.shape("encoder.conv_in.conv.weight")[1],
                "out_channels": source.shape("decoder.conv_out.conv.bias")[0],
                "latent_channels": source.shape("post_quant_conv.bias")[0],
                "layers_per_block": source.count(resnet.replace("{j}", "{i}")),
            },
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _ignored_keys(cfg: VaeConfig) -> tuple[str, ...]:
    """Match the tensors of Tencent's training loss, which its file may hold."""
    return (r"^loss\.",)


TABLE = Table(
    kind="hunyuan_vae",
    description="HunyuanVideo VAE",
    detect_key="encoder.mid_block.resnets.0.conv1.conv.weight",
    rows=_diffusers_rows,
    config=_config,
    ignored_keys=_ignored_keys,
)
COMFYUI = dataclasses.replace(
    TABLE,
    description="HunyuanVideo VAE in ComfyUI's naming",
    detect_key="encoder.mid.block_1.conv1.conv.weight",
    rows=_comfyui_rows,
)
