"""Tables of Wan 2.1's causal 3-D VAE in the naming of diffusers and of the original release.

Source: the state dicts of diffusers' `AutoencoderKLWan` and of `Wan2.1_VAE.pth`, which ComfyUI's
repackaged file keeps. The original numbers the blocks of each half without gaps, residual blocks
and changes of resolution alike; diffusers does so in the encoder alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from framepack_jax.conversion.engine import Source, Table
from framepack_jax.conversion.transforms import (
    Conv,
    Conv2d,
    Linear,
    Pointwise,
    Row,
    Vector,
    kernel,
    linear,
)
from framepack_jax.conversion.weight_files import ConversionError, make_config, reading_shapes
from framepack_jax.models.wan.vae_config import WanVaeConfig

# (config, resolution, block of it) -> prefix of its tensors; the block after the last residual one
# changes the resolution.
Place = Callable[[WanVaeConfig, int, int], str]


@dataclasses.dataclass(frozen=True)
class Names:
    """One naming.

    `outer` and `resnet` map our modules to theirs; `middle` names residual block, attention and
    residual block of a half; `down` and `up` place the blocks of the halves.
    """

    outer: Mapping[str, str]
    resnet: Mapping[str, str]
    middle: tuple[str, str, str]
    down: Place
    up: Place


def _flat(half: str, residual: int, cfg: WanVaeConfig, level: int, block: int) -> str:
    """Place a block of a half that numbers blocks without gaps; it has `residual` residual blocks
    at each resolution in addition to the config's."""
    return f"{half}.{level * (cfg.layers_per_block + residual + 1) + block}"


def _diffusers_up(cfg: WanVaeConfig, level: int, block: int) -> str:
    last = block > cfg.layers_per_block
    return f"decoder.up_blocks.{level}.{'upsamplers.0' if last else f'resnets.{block}'}"


DIFFUSERS_NAMES = Names(
    outer={
        "encoder/conv_in": "encoder.conv_in",
        "encoder/norm_out": "encoder.norm_out",
        "encoder/conv_out": "encoder.conv_out",
        "encoder/quant": "quant_conv",
        "decoder/post_quant": "post_quant_conv",
        "decoder/conv_in": "decoder.conv_in",
        "decoder/norm_out": "decoder.norm_out",
        "decoder/conv_out": "decoder.conv_out",
    },
    resnet={
        "norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2",
        "shortcut": "conv_shortcut",
    },
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    down=functools.partial(_flat, "encoder.down_blocks", 0),
    up=_diffusers_up,
)  # fmt: skip
ORIGINAL_NAMES = Names(
    outer={
        "encoder/conv_in": "encoder.conv1",
        "encoder/norm_out": "encoder.head.0",
        "encoder/conv_out": "encoder.head.2",
        "encoder/quant": "conv1",
        "decoder/post_quant": "conv2",
        "decoder/conv_in": "decoder.conv1",
        "decoder/norm_out": "decoder.head.0",
        "decoder/conv_out": "decoder.head.2",
    },
    resnet={
        "norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
        "shortcut": "shortcut",
    },
    middle=("middle.0", "middle.1", "middle.2"),
    down=functools.partial(_flat, "encoder.downsamples", 0),
    up=functools.partial(_flat, "decoder.upsamples", 1),
)  # fmt: skip


def _rows(names: Names, cfg: WanVaeConfig) -> list[Row]:
    rows = [row for pair in names.outer.items() for row in _module(*pair)]
    for half in ("encoder", "decoder"):
        rows += _middle(names, half)
    for level in range(len(cfg.multipliers)):
        for half, name, place, count in (
            ("encoder", "down", names.down, cfg.layers_per_block),
            ("decoder", "up", names.up, cfg.layers_per_block + 1),
        ):
            target = f"{half}/{name}_{level}"
            for block in range(count):
                rows += _resnet(names, f"{target}/resnet_{block}", place(cfg, level, block))
            change = place(cfg, level, count)
            rows += kernel(f"{target}/space", f"{change}.resample.1", Conv2d())
            rows += kernel(f"{target}/time", f"{change}.time_conv", Conv())
    return rows


def _middle(names: Names, half: str) -> list[Row]:
    before, attention, after = (f"{half}.{name}" for name in names.middle)
    target = f"{half}/mid/attention"
    return [
        *_resnet(names, f"{half}/mid/resnet_0", before),
        *_norm(f"{target}/norm", f"{attention}.norm", 2),
        *_pointwise(f"{target}/qkv", f"{attention}.to_qkv"),
        *_pointwise(f"{target}/out", f"{attention}.proj"),
        *_resnet(names, f"{half}/mid/resnet_1", after),
    ]


def _resnet(names: Names, target: str, source: str) -> list[Row]:
    pairs = ((f"{target}/{ours}", f"{source}.{theirs}") for ours, theirs in names.resnet.items())
    return [row for pair in pairs for row in _module(*pair)]


def _module(target: str, source: str) -> list[Row]:
    """Return the rows of a norm or a convolution, by its name."""
    is_norm = "norm" in target.rpartition("/")[2]
    return _norm(target, source, 3) if is_norm else kernel(target, source, Conv())


def _norm(target: str, source: str, ones: int) -> list[Row]:
    return [Row((f"{target}/scale",), (f"{source}.gamma",), Vector(ones))]


def _pointwise(target: str, source: str) -> list[Row]:
    weight, bias = linear(target, source)
    return [dataclasses.replace(weight, transform=Pointwise(Linear(), ones=2)), bias]


def _config(names: Names, source: Source) -> WanVaeConfig:
    fields = source.config_json() or {}
    _refuse_wan22(names, source, fields)
    # A release of the original has the transformer's config.json beside the VAE.
    if "base_dim" not in fields:
        return _config_from_shapes(names, source)
    single = {"decoder_base_dim": fields["base_dim"]} if fields.get("decoder_base_dim") else {}
    source.require(fields, {"attn_scales": [], "patch_size": None, **single})
    theirs = {
        "in_channels": "in_channels", "out_channels": "out_channels", "latent_channels": "z_dim",
        "width": "base_dim", "multipliers": "dim_mult", "layers_per_block": "num_res_blocks",
        "halves_time": "temperal_downsample",
    }  # fmt: skip
    sizes = {ours: fields[name] for ours, name in theirs.items() if name in fields}
    sizes = {name: tuple(x) if isinstance(x, list) else x for name, x in sizes.items()}
    return make_config(source.checkpoint.folder / "config.json", WanVaeConfig, **sizes)


def _refuse_wan22(names: Names, source: Source, fields: Mapping[str, Any]) -> None:
    """Raise ConversionError for the VAE of Wan 2.2, whose blocks are nested once more."""
    nested = (
        "encoder.down_blocks.0.resnets.0.conv1.weight",
        "encoder.downsamples.0.downsamples.0.residual.2.weight",
    )
    if fields.get("is_residual") or any(source.has(name) for name in nested):
        channels = source.shape(f"{names.outer['decoder/post_quant']}.bias")[0]
        raise ConversionError(
            f"{source.checkpoint.path} is the VAE of Wan 2.2 ({channels} latent channels, 16x16x4"
            " compression), which is not supported; Wan 2.1 and Helios use Wan 2.1's: the folder"
            " vae of Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or the file Wan2.1_VAE.pth"
        )


def _config_from_shapes(names: Names, source: Source) -> WanVaeConfig:
    """Return the config that the shapes tell: every field of it."""
    # With one block a resolution, the encoder's blocks count from 0 without gaps.
    half = names.down(WanVaeConfig(layers_per_block=1), 0, 0).removesuffix("0")
    conv = f"{names.resnet['conv2']}.bias"
    with reading_shapes(source.checkpoint.path):
        levels: list[list[int]] = [[]]
        halves_time: list[bool] = []
        count = max(source.count(f"{half}{{i}}.{leaf}") for leaf in (conv, "resample.1.bias"))
        for block in range(count):
            if source.has(f"{half}{block}.resample.1.bias"):
                levels.append([])
                halves_time.append(source.has(f"{half}{block}.time_conv.bias"))
            else:
                levels[-1].append(source.shape(f"{half}{block}.{conv}")[0])
        width = source.shape(f"{names.outer['encoder/conv_in']}.bias")[0]
        return make_config(
            source.checkpoint.path,
            WanVaeConfig,
            in_channels=source.shape(f"{names.outer['encoder/conv_in']}.weight")[1],
            out_channels=source.shape(f"{names.outer['decoder/conv_out']}.bias")[0],
            latent_channels=source.shape(f"{names.outer['decoder/post_quant']}.bias")[0],
            width=width,
            multipliers=tuple(channels[0] // width for channels in levels),
            layers_per_block=len(levels[0]),
            halves_time=tuple(halves_time),
        )


def _table(names: Names, description: str, detect_key: str) -> Table:
    return Table(
        kind="wan_vae",
        description=description,
        detect_key=detect_key,
        rows=functools.partial(_rows, names),
        config=functools.partial(_config, names),
    )


DIFFUSERS = _table(DIFFUSERS_NAMES, "Wan 2.1 VAE", "encoder.mid_block.attentions.0.to_qkv.weight")
ORIGINAL = _table(
    ORIGINAL_NAMES, "Wan 2.1 VAE in the original naming", "encoder.middle.1.to_qkv.weight"
)
