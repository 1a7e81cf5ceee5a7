"""Table of the causal 3-D VAE, in diffusers' naming, which Tencent's original shares behind `vae.`.

Source: the state dict of diffusers' `AutoencoderKLHunyuanVideo` and of Tencent's
`pytorch_model.pt`; the two differ in the names of their `config.json` alone.
"""

import math
from typing import Any

from framepack_jax.conversion.engine import Source, Table
from framepack_jax.conversion.readers import ConversionError, make_config, reading_shapes
from framepack_jax.conversion.transforms import Conv, Row, each, kernel, linear, norm
from framepack_jax.models.vae import Config

SCALING_FACTOR = 0.476986
BLOCK_TYPES = {
    "HunyuanVideoDownBlock3D", "DownEncoderBlockCausal3D",
    "HunyuanVideoUpBlock3D", "UpDecoderBlockCausal3D",
}  # fmt: skip
RELEASED = Config()
Numbers = tuple[float, ...]


def _rows(cfg: Config) -> list[Row]:
    return [
        *_conv("encoder/conv_in", "encoder.conv_in.conv"),
        *_resnets("encoder/down_{i}/resnet_{j}", "encoder.down_blocks.{i}.resnets.{j}"),
        *_conv("encoder/down_{i}/downsample", "encoder.down_blocks.{i}.downsamplers.0.conv.conv"),
        *_middle("encoder"),
        *norm("encoder/norm_out", "encoder.conv_norm_out"),
        *_conv("encoder/conv_out", "encoder.conv_out.conv"),
        *_conv("encoder/quant", "quant_conv"),
        *_conv("decoder/post_quant", "post_quant_conv"),
        *_conv("decoder/conv_in", "decoder.conv_in.conv"),
        *_middle("decoder"),
        *_resnets("decoder/up_{i}/resnet_{j}", "decoder.up_blocks.{i}.resnets.{j}"),
        *_conv("decoder/up_{i}/upsample", "decoder.up_blocks.{i}.upsamplers.0.conv.conv"),
        *norm("decoder/norm_out", "decoder.conv_norm_out"),
        *_conv("decoder/conv_out", "decoder.conv_out.conv"),
    ]


def _conv(target: str, source: str) -> list[Row]:
    return kernel(target, source, Conv())


def _resnets(target: str, source: str) -> list[Row]:
    return [
        *norm(f"{target}/norm1", f"{source}.norm1"),
        *_conv(f"{target}/conv1", f"{source}.conv1.conv"),
        *norm(f"{target}/norm2", f"{source}.norm2"),
        *_conv(f"{target}/conv2", f"{source}.conv2.conv"),
        *_conv(f"{target}/shortcut", f"{source}.conv_shortcut.conv"),
    ]


def _middle(half: str) -> list[Row]:
    attention, mid = f"{half}/mid/attention", f"{half}.mid_block"
    return [
        *_resnets(f"{half}/mid/resnet_{{j}}", f"{mid}.resnets.{{j}}"),
        *norm(f"{attention}/norm", f"{mid}.attentions.0.group_norm"),
        *linear(f"{attention}/qkv", each(f"{mid}.attentions.0.to_*")),
        *linear(f"{attention}/out", f"{mid}.attentions.0.to_out.0"),
    ]


def _config(source: Source) -> Config:
    fields = source.checkpoint.config()
    return _config_from_shapes(source) if fields is None else _config_from_json(source, fields)


def _config_from_json(source: Source, fields: dict[str, Any]) -> Config:
    if "block_out_channels" not in fields:
        raise ConversionError(
            f"{source.checkpoint.folder}/config.json belongs to another model (it has no"
            " block_out_channels); put the VAE's there, or none"
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
        Config,
        **sizes,
        channels=tuple(channels) if _is_list(channels) else channels,
    )


def _config_from_shapes(source: Source) -> Config:
    block = "encoder.down_blocks.{i}.resnets.0.conv2.conv.bias"
    with reading_shapes(source.checkpoint.path):
        blocks = range(source.count(block))
        channels = tuple(source.shape(block.replace("{i}", str(i)))[0] for i in blocks)
        if channels != RELEASED.channels:
            raise ConversionError(
                f"{source.checkpoint.path}: a VAE of widths {channels} needs its config.json beside"
                " it, for shapes do not tell its norm groups and compression"
            )
        return make_config(
            source.checkpoint.path,
            Config,
            in_channels=source.shape("encoder.conv_in.conv.weight")[1],
            out_channels=source.shape("decoder.conv_out.conv.bias")[0],
            latent_channels=source.shape("post_quant_conv.bias")[0],
            layers_per_block=source.count("encoder.down_blocks.0.resnets.{i}.norm1.bias"),
        )


def latent_statistics(
    fields: dict[str, Any] | None, channels: int
) -> tuple[tuple[float, ...], ...]:
    """(mean, std) of each latent channel from the scaling and shift of a VAE's `config.json`.
    Raises ConversionError where they are no numbers."""
    fields = fields or {}
    shift = fields.get("shift_factor") or 0.0
    scale = fields.get("scaling_factor") or SCALING_FACTOR
    for name, value in (("shift_factor", shift), ("scaling_factor", scale)):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ConversionError(f"config.json of the VAE: {name} = {value!r}; expected a number")
    return (float(shift),) * channels, (1 / scale,) * channels


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _leftovers(cfg: Config) -> tuple[str, ...]:
    """Tencent's file may carry what its training needed."""
    return (r"^loss\.",)


TABLE = Table(
    kind="hunyuan_vae",
    what="HunyuanVideo VAE",
    landmark="encoder.conv_in.conv.weight",
    rows=_rows,
    config=_config,
    prefixes=("", "vae."),
    leftovers=_leftovers,
)
