"""Tables of Wan's and Helios' transformer in the naming of diffusers and of the original release.

Source: the state dicts of diffusers' `WanTransformer3DModel` and `HeliosTransformer3DModel`, and of
`WanModel` of the original release, whose names ComfyUI keeps.
"""

from collections.abc import Mapping
from typing import Any

from framepack_jax.conversion.engine import Source, Table
from framepack_jax.conversion.from_base import packed_table
from framepack_jax.conversion.transforms import (
    Copy,
    Linear,
    Patch,
    Row,
    Unbatched,
    each,
    kernel,
    linear,
    norm,
)
from framepack_jax.conversion.weight_files import ConversionError, make_config, reading_shapes
from framepack_jax.models.packed_video import PATCH
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.packing import kernel_shape
from framepack_jax.utils.messages import shorten

KIND = "wan_packed_dit"
CONTEXT_NAMES = {"k1": "patch_short", "k2": "patch_mid", "k4": "patch_long"}
KEY_SCALES = {"scalar": "all", "per_head": "each"}
# Modules of models that are near to Wan 2.1 but read other inputs.
STRANGERS = {
    "vace_patch_embedding.weight": "a VACE model",
    "img_emb.proj.0.weight": "an image-to-video model of Wan",
    "condition_embedder.image_embedder.norm1.weight": "an image-to-video model of Wan",
    "control_adapter.conv.weight": "a camera-control model of Wan",
}
REMEDY = (
    "which reads other inputs and is not supported; take a text-to-video model of Wan 2.1 or of"
    " Helios"
)
WAN_22_CHANNELS = 48
RELEASED = WanConfig()
HELIOS = WanConfig(context_kernels=tuple(CONTEXT_NAMES), clean_context=True, prompt_to_target=True)


def _diffusers_rows(cfg: WanConfig) -> list[Row]:
    block, embedder = "blocks.{i}", "condition_embedder"
    helios = bool(cfg.context_kernels)
    return [
        *kernel("embed/patch", "patch_embedding", Patch(kernel_shape(PATCH))),
        *_context_rows(cfg),
        *linear("embed/time_in", f"{embedder}.time_embedder.linear_1"),
        *linear("embed/time_out", f"{embedder}.time_embedder.linear_2"),
        *linear("embed/time_mod", f"{embedder}.time_proj"),
        *linear("embed/text_in", f"{embedder}.text_embedder.linear_1"),
        *linear("embed/text_out", f"{embedder}.text_embedder.linear_2"),
        Row(("blocks/{i}/modulation",), (f"{block}.scale_shift_table",), Unbatched()),
        *linear("blocks/{i}/qkv", each(f"{block}.attn1.to_*")),
        _wide_norm("q_norm", f"{block}.attn1.norm_q"),
        _wide_norm("k_norm", f"{block}.attn1.norm_k"),
        *linear("blocks/{i}/out", f"{block}.attn1.to_out.0"),
        Row(("blocks/{i}/context_key_scale",), (f"{block}.attn1.history_key_scale",), Copy()),
        *norm("blocks/{i}/cross_norm", f"{block}.norm2"),
        *linear("blocks/{i}/cross_q", f"{block}.attn2.to_q"),
        *linear("blocks/{i}/cross_kv", each(f"{block}.attn2.to_*", "kv")),
        _wide_norm("cross_q_norm", f"{block}.attn2.norm_q"),
        _wide_norm("cross_k_norm", f"{block}.attn2.norm_k"),
        *linear("blocks/{i}/cross_out", f"{block}.attn2.to_out.0"),
        *linear("blocks/{i}/mlp_in", f"{block}.ffn.net.0.proj"),
        *linear("blocks/{i}/mlp_out", f"{block}.ffn.net.2"),
        Row(
            ("head/modulation",),
            ("norm_out.scale_shift_table" if helios else "scale_shift_table",),
            Unbatched(),
        ),
        *linear("head/out", "proj_out"),
    ]


def _original_rows(cfg: WanConfig) -> list[Row]:
    block = "blocks.{i}"
    return [
        *kernel("embed/patch", "patch_embedding", Patch(kernel_shape(PATCH))),
        *_context_rows(cfg),
        *linear("embed/time_in", "time_embedding.0"),
        *linear("embed/time_out", "time_embedding.2"),
        *linear("embed/time_mod", "time_projection.1"),
        *linear("embed/text_in", "text_embedding.0"),
        *linear("embed/text_out", "text_embedding.2"),
        Row(("blocks/{i}/modulation",), (f"{block}.modulation",), Unbatched()),
        *linear("blocks/{i}/qkv", each(f"{block}.self_attn.*")),
        _wide_norm("q_norm", f"{block}.self_attn.norm_q"),
        _wide_norm("k_norm", f"{block}.self_attn.norm_k"),
        *linear("blocks/{i}/out", f"{block}.self_attn.o"),
        # What the release does not have keeps diffusers' names.
        Row(("blocks/{i}/context_key_scale",), (f"{block}.self_attn.history_key_scale",), Copy()),
        *norm("blocks/{i}/cross_norm", f"{block}.norm3"),
        *linear("blocks/{i}/cross_q", f"{block}.cross_attn.q"),
        *linear("blocks/{i}/cross_kv", each(f"{block}.cross_attn.*", "kv")),
        _wide_norm("cross_q_norm", f"{block}.cross_attn.norm_q"),
        _wide_norm("cross_k_norm", f"{block}.cross_attn.norm_k"),
        *linear("blocks/{i}/cross_out", f"{block}.cross_attn.o"),
        *linear("blocks/{i}/mlp_in", f"{block}.ffn.0"),
        *linear("blocks/{i}/mlp_out", f"{block}.ffn.2"),
        Row(("head/modulation",), ("head.modulation",), Unbatched()),
        *linear("head/out", "head.head"),
    ]


def _context_rows(cfg: WanConfig) -> list[Row]:
    """Return rows for the embeddings of context, which have no name of their own in the release."""
    return [
        row
        for k in cfg.context_kernels
        for row in kernel(
            f"embed/context_{k}", CONTEXT_NAMES.get(k, f"patch_{k}"), Patch(kernel_shape(k))
        )
    ]


def _wide_norm(name: str, source: str) -> Row:
    return Row((f"blocks/{{i}}/{name}/scale",), (f"{source}.weight",), Linear(is_bias=True))


def _config(source: Source) -> WanConfig:
    """Read the config from diffusers' or the release's `config.json`, or else from shapes."""
    path = source.checkpoint.path
    for tensor, model in STRANGERS.items():
        if source.has(tensor):
            raise ConversionError(f"{path} is {model} (it has a tensor {tensor}), {REMEDY}")
    fields = source.config_json()
    if fields is None:
        cfg = _config_from_shapes(source)
    elif "num_attention_heads" in fields:
        cfg = _config_from_diffusers(source, fields)
    elif "num_heads" in fields:
        cfg = _config_from_release(source, fields)
    else:
        raise ConversionError(
            f"{source.checkpoint.folder}/config.json belongs to another model (it has neither"
            " num_attention_heads nor num_heads); replace it by the transformer's, or remove it"
        )
    if cfg.in_channels != cfg.out_channels:
        raise ConversionError(
            f"{path} reads {cfg.in_channels} channels and predicts {cfg.out_channels}: it is an"
            f" image-to-video or control model of Wan, {REMEDY}"
        )
    if cfg.in_channels == WAN_22_CHANNELS:
        raise ConversionError(
            f"{path} has {cfg.in_channels} latent channels: it is Wan 2.2's model of 5B, {REMEDY}"
        )
    _check_context(source, cfg)
    return cfg


def _check_context(source: Source, cfg: WanConfig) -> None:
    """Raise ConversionError for some of Helios' context embeddings without the others."""
    names = [f"{name}.weight" for name in CONTEXT_NAMES.values()]
    there = [name for name in names if source.has(name)]
    absent = [name for name in names if name not in there]
    if absent and (there or cfg.context_kernels):
        raise ConversionError(
            f"{source.checkpoint.path} has no tensor {' and no '.join(absent)}"
            f"{f', but {shorten(there)}' if there else ''}: Helios embeds its history with"
            f" {', '.join(names)}; take the whole checkpoint, or start from a model of Wan, which"
            " has none of them, with --from-base"
        )


def _config_from_diffusers(source: Source, fields: Mapping[str, Any]) -> WanConfig:
    supported = {
        "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True,
        "added_kv_proj_dim": None, "image_dim": None, "pos_embed_seq_len": None,
    }  # fmt: skip
    source.require(fields, supported)
    names = {
        "num_attention_heads": "heads",
        "attention_head_dim": "head_dim",
        "num_layers": "layers",
        "ffn_dim": "mlp_dim",
        "freq_dim": "time_dim",
        "eps": "norm_eps",
        "zero_history_timestep": "clean_context",
        "guidance_cross_attn": "prompt_to_target",
        **{name: name for name in ("in_channels", "out_channels", "text_dim", "rope_theta")},
    }
    sizes = {ours: fields[theirs] for theirs, ours in names.items() if theirs in fields}
    if fields.get("has_multi_term_memory_patch"):
        sizes["context_kernels"] = tuple(CONTEXT_NAMES)
    if fields.get("is_amplify_history"):
        sizes["context_key_scale"] = KEY_SCALES[fields.get("history_scale_mode", "per_head")]
    axes = fields.get("rope_dim") or rope_axes(sizes.get("head_dim", RELEASED.head_dim))
    path = source.checkpoint.folder / "config.json"
    return make_config(path, WanConfig, **sizes, rope_axes=tuple(axes))


def _config_from_release(source: Source, fields: Mapping[str, Any]) -> WanConfig:
    supported = {
        "model_type": "t2v", "patch_size": [1, 2, 2], "qk_norm": True, "cross_attn_norm": True,
        "window_size": [-1, -1],
    }  # fmt: skip
    source.require(fields, supported)
    names = {
        "num_heads": "heads",
        "num_layers": "layers",
        "ffn_dim": "mlp_dim",
        "freq_dim": "time_dim",
        "eps": "norm_eps",
        "in_dim": "in_channels",
        "out_dim": "out_channels",
        "text_dim": "text_dim",
    }
    sizes = {ours: fields[theirs] for theirs, ours in names.items() if theirs in fields}
    path = source.checkpoint.folder / "config.json"
    with reading_shapes(path):
        head_dim = int(fields["dim"]) // int(fields["num_heads"])
    return make_config(
        path,
        WanConfig,
        **sizes,
        head_dim=head_dim,
        rope_axes=rope_axes(head_dim),
        **_context(source),
    )


def _context(source: Source) -> dict[str, Any]:
    """Return the fields of context of a network whose config does not have them."""
    kernels = tuple(k for k, name in CONTEXT_NAMES.items() if source.has(f"{name}.weight"))
    has_context = bool(kernels)
    return {
        "context_kernels": kernels,
        "clean_context": has_context,
        "prompt_to_target": has_context,
    }


def _config_from_shapes(source: Source) -> WanConfig:
    rows = source.table.rows(HELIOS)
    tensor = {target: row.sources[0] for row in rows for target in row.targets}

    def shape(target: str) -> tuple[int, ...]:
        return source.shape(tensor[target])

    known = source.like if isinstance(source.like, WanConfig) else RELEASED
    with reading_shapes(source.checkpoint.path):
        width, in_channels = shape("embed/patch/kernel")[:2]
        if width % known.head_dim:
            raise ConversionError(
                f"{source.checkpoint.path}: a transformer of width {width} without config.json has"
                f" no whole number of heads of {known.head_dim}; put its config.json beside it"
            )
        return make_config(
            source.checkpoint.path,
            WanConfig,
            in_channels=in_channels,
            out_channels=shape("head/out/bias")[0] // 4,
            heads=width // known.head_dim,
            head_dim=known.head_dim,
            layers=source.count(tensor["blocks/{i}/modulation"]),
            mlp_dim=shape("blocks/{i}/mlp_in/bias")[0],
            text_dim=shape("embed/text_in/kernel")[1],
            time_dim=shape("embed/time_in/kernel")[1],
            rope_axes=known.rope_axes,
            **_context(source),
        )


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Return how Wan divides a head's width into time, height and width."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


DIFFUSERS = Table(
    kind=KIND,
    description="Wan or Helios transformer in diffusers' naming",
    detect_key="condition_embedder.time_proj.weight",
    rows=_diffusers_rows,
    config=_config,
)
ORIGINAL = Table(
    kind=KIND,
    description="Wan transformer in the original naming",
    detect_key="time_projection.1.weight",
    rows=_original_rows,
    config=_config,
)


def from_base(table: Table, context_kernels: tuple[str, ...], image_dim: int | None) -> Table:
    """Return the table that makes a packed model, as Helios is one, from a base Wan checkpoint.

    Raises ConversionError for an `image_dim`: the network reads no image tokens.
    """
    if image_dim is not None:
        raise ConversionError(
            f"--from-base: Wan's transformer reads no image tokens (of width {image_dim}); remove"
            " --image-dim and --image-encoder, and take --encoders-from a bundle of Wan or Helios"
        )
    names = ("context_kernels", "clean_context", "prompt_to_target")
    return packed_table(
        table,
        packed={name: getattr(HELIOS, name) for name in names}
        | {"context_kernels": context_kernels},
        base={name: getattr(RELEASED, name) for name in names},
    )
