"""Tables of the packed transformer in the naming of diffusers (and FramePack), Tencent, ComfyUI.

Source: the state dicts of diffusers' `HunyuanVideoFramepackTransformer3DModel` (the names of the
released FramePack models), of its `HunyuanVideoTransformer3DModel`, and of Tencent's
`mp_rank_00_model_states.pt`. Tencent fuses q, k, v (and the feed-forward of single blocks), and its
final modulation is ordered (shift, scale). ComfyUI saves Tencent's tensors under the names of its
own modules, by the substitutions in `comfy/supported_models.py`.
"""

import dataclasses
from typing import Any

from framepack_jax.conversion.engine import Source, Table
from framepack_jax.conversion.from_base import packed_table
from framepack_jax.conversion.transforms import (
    Fresh,
    Linear,
    Patch,
    Row,
    each,
    kernel,
    linear,
    norm,
)
from framepack_jax.conversion.weight_files import ConversionError, make_config, reading_shapes
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.packed_video import PATCH
from framepack_jax.packing import kernel_shape

KIND = "hunyuan_packed_dit"
CONTEXT_NAMES = {"k1": "proj", "k2": "proj_2x", "k4": "proj_4x"}
# Substitutions from Tencent's names to ComfyUI's, applied in this order.
COMFYUI_NAMES = (
    ("_embedder.mlp.0.", "_embedder.in_layer."),
    ("_embedder.mlp.2.", "_embedder.out_layer."),
    ("c_embedder.linear_1.", "c_embedder.in_layer."),
    ("c_embedder.linear_2.", "c_embedder.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."),
    ("_in.mlp.2.", "_in.out_layer."),
    ("mod.linear.", "mod.lin."),
    ("modulation.linear.", "modulation.lin."),
    ("attn_qkv.", "attn.qkv."),
    ("attn_proj.", "attn.proj."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
    (".q_norm.weight", ".norm.query_norm.scale"),
    (".k_norm.weight", ".norm.key_norm.scale"),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
)
# Sizes of the released models: without a config, RoPE axes are known for this head width only.
RELEASED = TransformerConfig()


def _diffusers_rows(cfg: TransformerConfig) -> list[Row]:
    time, text = "time_text_embed", "context_embedder.time_text_embed"
    refiner = "context_embedder.token_refiner.refiner_blocks.{i}"
    double, single = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
    return [
        *kernel("embed/patch", "x_embedder.proj", Patch(kernel_shape(PATCH))),
        *_framepack_rows(cfg),
        *_embedder("time", f"{time}.timestep_embedder"),
        *_embedder("guidance", f"{time}.guidance_embedder"),
        *_embedder("pooled", f"{time}.text_embedder"),
        *_embedder("text_time", f"{text}.timestep_embedder"),
        *_embedder("text_pooled", f"{text}.text_embedder"),
        *linear("embed/text_proj", "context_embedder.proj_in"),
        *norm("refiner/{i}/norm1", f"{refiner}.norm1"),
        *linear("refiner/{i}/qkv", each(f"{refiner}.attn.to_*")),
        *linear("refiner/{i}/out", f"{refiner}.attn.to_out.0"),
        *norm("refiner/{i}/norm2", f"{refiner}.norm2"),
        *linear("refiner/{i}/mlp_in", f"{refiner}.ff.net.0.proj"),
        *linear("refiner/{i}/mlp_out", f"{refiner}.ff.net.2"),
        *linear("refiner/{i}/gate", f"{refiner}.norm_out.linear"),
        *linear("double/{i}/img_mod", f"{double}.norm1.linear"),
        *linear("double/{i}/img_qkv", each(f"{double}.attn.to_*")),
        *norm("double/{i}/img_q_norm", f"{double}.attn.norm_q", bias=False),
        *norm("double/{i}/img_k_norm", f"{double}.attn.norm_k", bias=False),
        *linear("double/{i}/img_out", f"{double}.attn.to_out.0"),
        *linear("double/{i}/img_mlp_in", f"{double}.ff.net.0.proj"),
        *linear("double/{i}/img_mlp_out", f"{double}.ff.net.2"),
        *linear("double/{i}/txt_mod", f"{double}.norm1_context.linear"),
        *linear("double/{i}/txt_qkv", each(f"{double}.attn.add_*_proj")),
        *norm("double/{i}/txt_q_norm", f"{double}.attn.norm_added_q", bias=False),
        *norm("double/{i}/txt_k_norm", f"{double}.attn.norm_added_k", bias=False),
        *linear("double/{i}/txt_out", f"{double}.attn.to_add_out"),
        *linear("double/{i}/txt_mlp_in", f"{double}.ff_context.net.0.proj"),
        *linear("double/{i}/txt_mlp_out", f"{double}.ff_context.net.2"),
        *linear("single/{i}/mod", f"{single}.norm.linear"),
        *linear("single/{i}/qkv", each(f"{single}.attn.to_*")),
        *norm("single/{i}/q_norm", f"{single}.attn.norm_q", bias=False),
        *norm("single/{i}/k_norm", f"{single}.attn.norm_k", bias=False),
        *linear("single/{i}/mlp_in", f"{single}.proj_mlp"),
        *_single_out(f"{single}.proj_out"),
        *linear("head/mod", "norm_out.linear"),
        *linear("head/out", "proj_out"),
    ]


def _framepack_rows(cfg: TransformerConfig) -> list[Row]:
    """Return rows for the modules that FramePack adds to the base model."""
    return [
        *[
            row
            for k in cfg.context_kernels
            for row in kernel(
                f"embed/context_{k}",
                f"clean_x_embedder.{CONTEXT_NAMES.get(k, k)}",
                Patch(kernel_shape(k)),
            )
        ],
        *linear("embed/image_up", "image_projection.up"),
        *linear("embed/image_down", "image_projection.down"),
    ]


def _tencent_rows(cfg: TransformerConfig) -> list[Row]:
    refiner = "txt_in.individual_token_refiner.blocks.{i}"
    double, single = "double_blocks.{i}", "single_blocks.{i}"
    return [
        *kernel("embed/patch", "img_in.proj", Patch(kernel_shape(PATCH))),
        *_embedder("time", "time_in", "mlp.0", "mlp.2"),
        *_embedder("guidance", "guidance_in", "mlp.0", "mlp.2"),
        *_embedder("pooled", "vector_in", "in_layer", "out_layer"),
        *_embedder("text_time", "txt_in.t_embedder", "mlp.0", "mlp.2"),
        *_embedder("text_pooled", "txt_in.c_embedder"),
        *linear("embed/text_proj", "txt_in.input_embedder"),
        *norm("refiner/{i}/norm1", f"{refiner}.norm1"),
        *linear("refiner/{i}/qkv", f"{refiner}.self_attn_qkv"),
        *linear("refiner/{i}/out", f"{refiner}.self_attn_proj"),
        *norm("refiner/{i}/norm2", f"{refiner}.norm2"),
        *linear("refiner/{i}/mlp_in", f"{refiner}.mlp.fc1"),
        *linear("refiner/{i}/mlp_out", f"{refiner}.mlp.fc2"),
        *linear("refiner/{i}/gate", f"{refiner}.adaLN_modulation.1"),
        *[row for side in ("img", "txt") for row in _tencent_side(side, double)],
        *linear("single/{i}/mod", f"{single}.modulation.linear"),
        *linear(("single/{i}/qkv", "single/{i}/mlp_in"), f"{single}.linear1"),
        *norm("single/{i}/q_norm", f"{single}.q_norm", bias=False),
        *norm("single/{i}/k_norm", f"{single}.k_norm", bias=False),
        *_single_out(f"{single}.linear2"),
        *linear("head/mod", "final_layer.adaLN_modulation.1", swap=True),
        *linear("head/out", "final_layer.linear"),
    ]


def _tencent_side(side: str, double: str) -> list[Row]:
    here = f"double/{{i}}/{side}"
    return [
        *linear(f"{here}_mod", f"{double}.{side}_mod.linear"),
        *linear(f"{here}_qkv", f"{double}.{side}_attn_qkv"),
        *norm(f"{here}_q_norm", f"{double}.{side}_attn_q_norm", bias=False),
        *norm(f"{here}_k_norm", f"{double}.{side}_attn_k_norm", bias=False),
        *linear(f"{here}_out", f"{double}.{side}_attn_proj"),
        *linear(f"{here}_mlp_in", f"{double}.{side}_mlp.fc1"),
        *linear(f"{here}_mlp_out", f"{double}.{side}_mlp.fc2"),
    ]


def _tencent_framepack_rows(cfg: TransformerConfig) -> list[Row]:
    return [*_tencent_rows(cfg), *_framepack_rows(cfg)]


def _comfyui_rows(cfg: TransformerConfig) -> list[Row]:
    def renamed(name: str) -> str:
        for theirs, ours in COMFYUI_NAMES:
            name = name.replace(theirs, ours)
        return name

    return [
        dataclasses.replace(row, sources=tuple(map(renamed, row.sources)))
        for row in _tencent_rows(cfg)
    ]


def _comfyui_framepack_rows(cfg: TransformerConfig) -> list[Row]:
    return [*_comfyui_rows(cfg), *_framepack_rows(cfg)]


def _comfyui_weight_rows(cfg: TransformerConfig) -> list[Row]:
    return [
        dataclasses.replace(
            row, sources=tuple(name.replace("_norm.scale", "_norm.weight") for name in row.sources)
        )
        for row in _comfyui_rows(cfg)
    ]


def _embedder(
    name: str, source: str, first: str = "linear_1", second: str = "linear_2"
) -> list[Row]:
    return [
        *linear(f"embed/{name}_in", f"{source}.{first}"),
        *linear(f"embed/{name}_out", f"{source}.{second}"),
    ]


def _single_out(source: str) -> list[Row]:
    """Return rows for one matrix with (attention, feed-forward) inputs; its bias is used once."""
    kernels = ("single/{i}/attn_out/kernel", "single/{i}/mlp_out/kernel")
    return [
        Row(kernels, (f"{source}.weight",), Linear(split=1)),
        Row(("single/{i}/mlp_out/bias",), (f"{source}.bias",), Linear(is_bias=True)),
    ]


def _config(source: Source) -> TransformerConfig:
    """Read the config from `config.json` or, if there is none, from shapes."""
    fields = source.config_json()
    return _config_from_shapes(source) if fields is None else _config_from_json(source, fields)


def _config_from_json(source: Source, fields: dict[str, Any]) -> TransformerConfig:
    if "num_attention_heads" not in fields:
        raise ConversionError(
            f"{source.checkpoint.folder}/config.json belongs to another model (it has no"
            " num_attention_heads); replace it by the transformer's, or remove it"
        )
    supported = {
        "patch_size": 2, "patch_size_t": 1, "qk_norm": "rms_norm", "image_condition_type": None,
    }  # fmt: skip
    source.require(fields, supported)
    names = {
        "num_attention_heads": "heads",
        "attention_head_dim": "head_dim",
        "num_layers": "double_layers",
        "num_single_layers": "single_layers",
        "num_refiner_layers": "refiner_layers",
        "text_embed_dim": "text_dim",
        "pooled_projection_dim": "pooled_dim",
        "guidance_embeds": "guidance",
        **{name: name for name in ("in_channels", "out_channels", "mlp_ratio", "rope_theta")},
    }
    sizes = {ours: fields[theirs] for theirs, ours in names.items() if theirs in fields}
    axes = source.overrides.get("rope_axes") or fields.get("rope_axes_dim", RELEASED.rope_axes)
    cfg = make_config(
        source.checkpoint.folder / "config.json",
        TransformerConfig,
        **sizes,
        image_dim=fields.get("image_proj_dim", 1152) if fields.get("has_image_proj") else None,
        context_kernels=tuple(CONTEXT_NAMES) if fields.get("has_clean_x_embedder") else (),
        rope_axes=tuple(axes) if isinstance(axes, list) else axes,
    )
    return _with_checked_axes(source, cfg)


def _config_from_shapes(source: Source) -> TransformerConfig:
    rows = source.table.rows(RELEASED)
    tensor = {target: row.sources[0] for row in rows for target in row.targets}

    def shape(target: str) -> tuple[int, ...]:
        return source.shape(tensor[target])

    def has(target: str) -> bool:
        return target in tensor and source.has(tensor[target])

    with reading_shapes(source.checkpoint.path):
        width, in_channels = shape("embed/patch/kernel")[:2]
        (head_dim,) = shape("double/{i}/img_q_norm/scale")
        cfg = make_config(
            source.checkpoint.path,
            TransformerConfig,
            in_channels=in_channels,
            out_channels=shape("head/out/bias")[0] // 4,
            heads=width // head_dim,
            head_dim=head_dim,
            double_layers=source.count(tensor["double/{i}/img_mod/bias"]),
            single_layers=source.count(tensor["single/{i}/mod/bias"]),
            refiner_layers=source.count(tensor["refiner/{i}/gate/bias"]),
            mlp_ratio=shape("double/{i}/img_mlp_in/bias")[0] / width,
            text_dim=shape("embed/text_proj/kernel")[1],
            pooled_dim=shape("embed/pooled_in/kernel")[1],
            image_dim=shape("embed/image_up/kernel")[1] if has("embed/image_up/kernel") else None,
            guidance=has("embed/guidance_in/kernel"),
            rope_axes=source.overrides.get("rope_axes") or _known_axes(source, head_dim),
            context_kernels=tuple(k for k in CONTEXT_NAMES if has(f"embed/context_{k}/kernel")),
        )
    return _with_checked_axes(source, cfg)


def _known_axes(source: Source, head_dim: int) -> tuple[int, ...]:
    """Return the RoPE axes of the released model, or of the model that this one replaces if only
    that has heads of this width."""
    replaces = source.like is not None and source.like.head_dim == head_dim != RELEASED.head_dim
    return (source.like if replaces else RELEASED).rope_axes


def _with_checked_axes(source: Source, cfg: TransformerConfig) -> TransformerConfig:
    axes = cfg.rope_axes if isinstance(cfg.rope_axes, tuple) else (cfg.rope_axes,)
    # RoPE rotates pairs of numbers.
    if any(axis <= 0 or axis % 2 for axis in axes):
        problem = "are not all even and above 0"
    elif len(axes) != 3 or sum(axes) != cfg.head_dim:
        problem = f"do not add up to the head width {cfg.head_dim}"
    else:
        return cfg
    raise ConversionError(
        f"{source.checkpoint.path}: RoPE axes {','.join(map(str, axes))} {problem}; give time,"
        " height and width as --rope-axes T,H,W (4,6,6 for width 16)"
    )


DIFFUSERS = Table(
    kind=KIND,
    description="HunyuanVideo or FramePack transformer in diffusers' naming",
    detect_key="x_embedder.proj.weight",
    rows=_diffusers_rows,
    config=_config,
)
TENCENT = Table(
    kind=KIND,
    description="HunyuanVideo transformer in Tencent's naming",
    detect_key="img_in.proj.weight",
    rows=_tencent_rows,
    # The config.json beside Tencent's files belongs to another model.
    config=_config_from_shapes,
)
# FramePack models of trainers that use Tencent's code.
TENCENT_FRAMEPACK = dataclasses.replace(
    TENCENT,
    description="FramePack transformer in Tencent's naming",
    detect_key="clean_x_embedder.proj.weight",
    rows=_tencent_framepack_rows,
)
COMFYUI = Table(
    kind=KIND,
    description="HunyuanVideo transformer in ComfyUI's naming",
    detect_key="txt_in.t_embedder.in_layer.weight",
    rows=_comfyui_rows,
    config=_config_from_shapes,
)
# ComfyUI has no names for the modules that FramePack adds, which keep those of the release.
COMFYUI_FRAMEPACK = dataclasses.replace(
    COMFYUI,
    description="FramePack transformer in ComfyUI's naming",
    rows=_comfyui_framepack_rows,
)
# Saved by versions of ComfyUI that use PyTorch's norms.
COMFYUI_WEIGHT = dataclasses.replace(
    COMFYUI,
    detect_key="double_blocks.0.img_attn.norm.query_norm.weight",
    rows=_comfyui_weight_rows,
)


def from_base(table: Table, context_kernels: tuple[str, ...], image_dim: int | None) -> Table:
    """Return the table that makes a FramePack model from a base HunyuanVideo checkpoint.

    The image projection is new and random (LeCun normal, zero biases), so that image tokens have
    the scale that the text projection gives text tokens at its initialisation. Zero tokens would be
    as visible to attention, and the norms of the blocks would multiply their gradients by a
    thousand. The width `image_dim` of image states is by default the release's.
    """
    width = image_dim or RELEASED.image_dim
    return packed_table(
        table,
        packed={"context_kernels": context_kernels, "image_dim": width},
        base={"context_kernels": (), "image_dim": None},
        new={
            "embed/image_up/kernel": Fresh("image_up"),
            "embed/image_up/bias": Fresh(),
            "embed/image_down/kernel": Fresh("image_down"),
            "embed/image_down/bias": Fresh(),
        },
        what="context embeddings or an image projection",
    )
