"""PyTorch checkpoints into bundles: formats, namings, what is refused, what is written."""

import dataclasses
import json
import math
import shutil
import sys
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKLHunyuanVideo,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)
from safetensors.numpy import load_file
from safetensors.torch import save_file

from framepack_jax import __main__ as cli
from framepack_jax import bundle
from framepack_jax.cli.convert import main
from framepack_jax.conditioning import PROMPT_TEMPLATE
from framepack_jax.conversion import engine, inspect, tables, transformer, weight_files
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models.hunyuan import vae
from framepack_jax.models.hunyuan.config import TransformerConfig, VaeConfig
from framepack_jax.models.hunyuan.embed import Conditions, ContextEmbed
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.tiling import Tiling
from framepack_jax.packing import PackedContext, kernel_shape
from framepack_jax.utils import prefetch
from tests.fixtures.checkpoints import (
    CLIP,
    LLAMA,
    RELEASED,
    SIGLIP,
    SIZES,
    Leaves,
    assert_same,
    plan_of,
)
from tests.fixtures.torch_reference import randomize, relative_error

PARITY = 2e-4
CFG = TransformerConfig(
    heads=2, head_dim=16, double_layers=2, single_layers=3, refiner_layers=1, mlp_ratio=2.0,
    text_dim=20, pooled_dim=12, image_dim=10, rope_axes=(4, 6, 6),
)  # fmt: skip


@pytest.fixture(scope="module")
def framepack() -> torch.nn.Module:
    model = HunyuanVideoFramepackTransformer3DModel(
        **SIZES, has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True
    )
    return randomize(model, 1)


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return randomize(HunyuanVideoTransformer3DModel(**SIZES), 2)


@pytest.fixture(scope="module")
def autoencoder() -> torch.nn.Module:
    model = AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=5,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3, scaling_factor=0.25,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3, spatial_compression_ratio=4,
    )  # fmt: skip
    return randomize(model, 3)


def state_of(model: torch.nn.Module) -> Leaves:
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def assert_every_number_moved_once(leaves: Leaves, tensors: Leaves) -> None:
    """Random numbers hardly repeat: the same sorted list is the same numbers, each once."""
    both = (np.sort(np.concatenate([x.ravel() for x in d.values()])) for d in (leaves, tensors))
    np.testing.assert_array_equal(*both)


def fused(tensors: Leaves, names: list[str]) -> np.ndarray:
    """q, k, v matrices -> (D, 3, 2, 16), number by number."""
    out = np.empty((tensors[names[0]].shape[1], 3, 2, 16), np.float32)
    for part, name in enumerate(names):
        for head in range(2):
            for d in range(16):
                out[:, part, head, d] = tensors[name][head * 16 + d]
    return out


# Formats


def write_folder(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def write_sharded(model, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def write_lone_file(model, folder: Path) -> Path:
    """No config: its sizes are told by shapes."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "any name.safetensors")
    return folder / "any name.safetensors"


def write_torch(wrap):
    def write(model, folder: Path) -> Path:
        folder.mkdir()
        torch.save(wrap(model.state_dict()), folder / "model.pt")
        return folder / "model.pt"

    return write


def write_old_torch(model, folder: Path) -> Path:
    """The format before zip files, which cannot be mapped."""
    folder.mkdir()
    file = folder / "model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    return folder


FORMATS = {
    "folder": write_folder,
    "sharded": write_sharded,
    "lone file": write_lone_file,
    "pt": write_torch(lambda state: state),
    "pt module": write_torch(lambda state: {"module": dict(state)}),
    "pt state_dict": write_torch(lambda state: {"state_dict": dict(state), "step": 7}),
    "old bin": write_old_torch,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same(name: str, framepack, tmp_path) -> None:
    plan = plan_of(FORMATS[name](framepack, tmp_path / "model"), rope_axes=(4, 6, 6))
    assert plan.cfg == CFG
    leaves = dict(plan.leaves())
    tensors = state_of(framepack)
    assert_every_number_moved_once(leaves, tensors)
    assert plan.nbytes() == sum(leaf.nbytes for leaf in leaves.values())
    names = [f"transformer_blocks.1.attn.to_{x}.weight" for x in "qkv"]
    np.testing.assert_array_equal(leaves["double/01/img_qkv/kernel"], fused(tensors, names))


@pytest.mark.parametrize("name", ["lone file", "pt"])
def test_bfloat16_keeps_its_bits(name: str, framepack, tmp_path) -> None:
    model = HunyuanVideoFramepackTransformer3DModel.from_config(framepack.config)
    model.load_state_dict(framepack.state_dict())
    model = model.to(torch.bfloat16)
    plan = plan_of(FORMATS[name](model, tmp_path / "model"), rope_axes=(4, 6, 6))
    leaves = dict(plan.leaves())
    read = plan.source.checkpoint.read("proj_out.bias")
    assert {x.dtype for x in [read, *leaves.values()]} == {np.dtype(ml_dtypes.bfloat16)}
    bits = {n: t.view(torch.int16).numpy() for n, t in model.state_dict().items()}
    assert_every_number_moved_once({p: x.view(np.int16) for p, x in leaves.items()}, bits)
    theirs = bits["transformer_blocks.0.ff.net.0.proj.weight"]
    np.testing.assert_array_equal(leaves["double/00/img_mlp_in/kernel"].view(np.int16), theirs.T)
    as_float = dict(plan.leaves("float32"))["double/00/img_mlp_in/kernel"]
    assert as_float.dtype == np.float32
    assert plan.nbytes("float32") == 2 * plan.nbytes()


# Namings


def test_diffusers_transformer(framepack, tmp_path) -> None:
    leaves = dict(plan_of(write_folder(framepack, tmp_path / "model")).leaves())
    tensors = state_of(framepack)
    single = "single_transformer_blocks.2"
    out = tensors[f"{single}.proj_out.weight"]
    expected = {
        "single/02/attn_out/kernel": out[:, :32].T,
        "single/02/mlp_out/kernel": out[:, 32:].T,
        "single/02/mlp_out/bias": tensors[f"{single}.proj_out.bias"],
        "single/02/q_norm/scale": tensors[f"{single}.attn.norm_q.weight"],
        "single/02/qkv/kernel": fused(tensors, [f"{single}.attn.to_{x}.weight" for x in "qkv"]),
        "double/01/txt_mod/kernel": tensors["transformer_blocks.1.norm1_context.linear.weight"].T,
        "refiner/00/norm2/bias": tensors[
            "context_embedder.token_refiner.refiner_blocks.0.norm2.bias"
        ],
        "head/mod/kernel": tensors["norm_out.linear.weight"].T,
        "embed/guidance_in/bias": tensors["time_text_embed.guidance_embedder.linear_1.bias"],
        "embed/image_down/kernel": tensors["image_projection.down.weight"].T,
    }
    assert_same({path: leaves[path] for path in expected}, expected)
    bias = leaves["double/00/txt_qkv/bias"]
    for part, name in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
        theirs = tensors[f"transformer_blocks.0.attn.{name}.bias"]
        np.testing.assert_array_equal(bias[part, 1], theirs[16:])
    patch, conv = leaves["embed/context_k2/kernel"], tensors["clean_x_embedder.proj_2x.weight"]
    for t, h, w, c in [(0, 0, 0, 0), (1, 2, 3, 5), (1, 3, 0, 15)]:
        row = ((t * 4 + h) * 4 + w) * 16 + c
        np.testing.assert_array_equal(patch[row], conv[:, c, t, h, w])


def test_vae(autoencoder, tmp_path) -> None:
    plan = plan_of(write_folder(autoencoder, tmp_path / "vae"), "vae")
    assert plan.cfg == VaeConfig(
        channels=(4, 8, 8), layers_per_block=1, norm_groups=2, latent_channels=5,
        space_compression=4,
    )  # fmt: skip
    leaves, tensors = dict(plan.leaves()), state_of(autoencoder)
    assert_every_number_moved_once(leaves, tensors)
    theirs = tensors["encoder.down_blocks.1.resnets.0.conv1.conv.weight"]
    ours = leaves["encoder/down_1/resnet_0/conv1/kernel"]
    np.testing.assert_array_equal(ours[2, 0, 1], theirs[:, :, 2, 0, 1].T)
    shortcut = tensors["encoder.down_blocks.1.resnets.0.conv_shortcut.conv.weight"]
    ours = leaves["encoder/down_1/resnet_0/shortcut/kernel"]
    np.testing.assert_array_equal(ours[0, 0, 0], shortcut[:, :, 0, 0, 0].T)
    qkv = leaves["decoder/mid/attention/qkv/kernel"]
    theirs = tensors["decoder.mid_block.attentions.0.to_v.weight"]
    np.testing.assert_array_equal(qkv[:, 2, 0], theirs.T)
    upsample = tensors["decoder.up_blocks.0.upsamplers.0.conv.conv.bias"]
    np.testing.assert_array_equal(leaves["decoder/up_0/upsample/bias"], upsample)


def llava() -> tuple[torch.nn.Module, transformers.PretrainedConfig]:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**LLAMA),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            image_size=14, patch_size=7,
        ),
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), config


def llamas() -> dict[str, tuple[dict[str, torch.Tensor], transformers.PretrainedConfig]]:
    """The same text model under every name that it goes by: (state dict, config)."""
    config = transformers.LlamaConfig(**LLAMA)
    bare = randomize(transformers.LlamaModel(config), 4)
    causal = randomize(transformers.LlamaForCausalLM(config), 5)
    causal.model.load_state_dict(bare.state_dict())
    wrapped, wrapped_config = llava()
    wrapped.model.language_model.load_state_dict(bare.state_dict())
    new = wrapped.state_dict()
    old = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("lm_head", "language_model.lm_head")
        .replace("model.vision_tower", "vision_tower")
        .replace("model.multi_modal", "multi_modal"): tensor
        for name, tensor in new.items()
    }
    assert "model.language_model.norm.weight" in new and "language_model.model.norm.weight" in old
    return {
        "bare": (bare.state_dict(), config),
        "causal": (causal.state_dict(), config),
        "llava": (new, wrapped_config),
        "old llava": (old, wrapped_config),
    }


def test_llama_under_every_prefix(tmp_path) -> None:
    found = {}
    for name, (state, config) in llamas().items():
        config.save_pretrained(tmp_path / name)
        save_file({k: v.clone() for k, v in state.items()}, tmp_path / name / "m.safetensors")
        plan = plan_of(tmp_path / name, "text_encoder")
        assert (plan.cfg.layers, plan.cfg.heads, plan.cfg.kv_heads) == (3, 4, 2)
        assert (plan.cfg.rope_theta, plan.cfg.norm_eps) == (1e4, 1e-6)
        found[name] = dict(plan.leaves())
    for leaves in found.values():
        assert_same(leaves, found["bare"])
    tensors = {k: v.numpy() for k, v in llamas()["bare"][0].items()}
    used = {
        k: v for k, v in tensors.items() if k[:9] not in ("layers.3.", "layers.4.", "norm.weig")
    }
    assert_every_number_moved_once(leaves, used)
    theirs = tensors["layers.2.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(leaves["layers/02/k/kernel"][:, 1, 3], theirs[8 + 3])
    theirs = tensors["layers.1.post_attention_layernorm.weight"]
    np.testing.assert_array_equal(leaves["layers/01/mlp_norm/scale"], theirs)
    theirs = tensors["layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(leaves["layers/01/down/kernel"], theirs.T)


def test_clip_bare_and_inside_the_whole_model(tmp_path) -> None:
    text = transformers.CLIPTextConfig(**CLIP)
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    whole_config = transformers.CLIPConfig(text_config=CLIP, vision_config=vision)
    bare = randomize(transformers.CLIPTextModel(text), 6)
    whole = randomize(transformers.CLIPModel(whole_config), 7)
    weights = {k.removeprefix("text_model."): v for k, v in bare.state_dict().items()}
    whole.text_model.load_state_dict(
        {k: weights[k.removeprefix("text_model.")] for k in whole.text_model.state_dict()}
    )
    plans = [
        plan_of(write_folder(model, tmp_path / name), "text_encoder_2")
        for name, model in {"bare": bare, "whole": whole}.items()
    ]
    leaves, from_whole = (dict(plan.leaves()) for plan in plans)
    assert plans[0].cfg == plans[1].cfg
    assert (plans[0].cfg.heads, plans[0].cfg.eos_token_id) == (3, 2)
    assert_same(from_whole, leaves)
    assert_every_number_moved_once(leaves, {k: v.numpy() for k, v in weights.items()})
    theirs = weights["encoder.layers.1.self_attn.v_proj.weight"].numpy()
    np.testing.assert_array_equal(leaves["layers/01/qkv/kernel"][:, 2, 1, 4], theirs[8 + 4])
    theirs = weights["embeddings.position_embedding.weight"].numpy()
    np.testing.assert_array_equal(leaves["position_embedding/embedding"], theirs)


def test_siglip_without_its_head(tmp_path) -> None:
    model = randomize(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP)), 8)
    plan = plan_of(write_folder(model, tmp_path / "siglip"), "image_encoder")
    assert (plan.cfg.image_size, plan.cfg.heads, plan.cfg.activation) == (17, 2, "gelu_tanh")
    leaves = dict(plan.leaves())
    tensors = {k.removeprefix("vision_model."): v for k, v in state_of(model).items()}
    used = {k: v for k, v in tensors.items() if not k.startswith("head.")}
    assert 0 < len(used) < len(tensors)
    assert_every_number_moved_once(leaves, used)
    theirs = tensors["embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(leaves["patch/kernel"][(3 * 7 + 5) * 3 + 2], theirs[:, 2, 3, 5])


def abstract_checkpoint(state: dict[str, torch.Tensor], path: Path) -> weight_files.Checkpoint:
    """Shapes without weights, and no config."""
    entries = {k: weight_files.Entry(tuple(v.shape), "bfloat16", None) for k, v in state.items()}
    return weight_files.Checkpoint(path / "lone.safetensors", [], entries)


@pytest.mark.parametrize("role", RELEASED)
def test_released_encoders_are_known_by_width(role: str, tmp_path) -> None:
    model, sizes = RELEASED[role]
    with torch.device("meta"):
        state = model(model.config_class(**sizes, intermediate_size=6)).state_dict()
    cfg = engine.plan(tables.recognise(abstract_checkpoint(state, tmp_path), role)).cfg
    thin = {"layers": 1, "mlp_width": 6}
    if "vocab_size" in sizes:
        thin["vocab_size"] = 7
    assert cfg == dataclasses.replace(type(cfg)(), **thin)
    narrow = {k: v[tuple(slice(n // 2) for n in v.shape)] for k, v in state.items()}
    checkpoint = abstract_checkpoint(narrow, tmp_path)
    with pytest.raises(ConversionError, match=r"needs its config\.json"):
        engine.plan(tables.recognise(checkpoint, role))


def test_full_size_models_fit(tmp_path) -> None:
    """Every tensor of the released models has its place; counts are those of the originals."""
    with torch.device("meta"):
        models = {
            "transformer": HunyuanVideoFramepackTransformer3DModel(
                has_image_proj=True, has_clean_x_embedder=True
            ),
            "vae": AutoencoderKLHunyuanVideo(),
        }
    counts = {"transformer": 12_874_314_816, "vae": 246_478_803}
    for role, model in models.items():
        checkpoint = abstract_checkpoint(model.state_dict(), tmp_path)
        plan = engine.plan(tables.recognise(checkpoint, role))
        assert plan.cfg == type(plan.cfg)()
        assert plan.nbytes() == 2 * counts[role]


@pytest.mark.parametrize(
    ("types", "expected"),
    [("hhb", "float32"), ("bbf", "float32"), ("bbb", "bfloat16"), ("hhf", "float32")],
)
def test_fused_tensors_of_mixed_types(types: str, expected: str, framepack, tmp_path) -> None:
    """In the narrowest type that holds them all; numbers of each stay as they are."""
    dtypes = {"h": torch.float16, "b": torch.bfloat16, "f": torch.float32}
    names = [f"transformer_blocks.1.attn.to_{x}.weight" for x in "qkv"]
    state = dict(framepack.state_dict())
    for name, letter in zip(names, types, strict=True):
        state[name] = state[name].to(dtypes[letter])
    save_file(state, tmp_path / "x.safetensors")
    plan = plan_of(tmp_path / "x.safetensors", rope_axes=(4, 6, 6))
    leaves = dict(plan.leaves())
    kernel = leaves["double/01/img_qkv/kernel"]
    assert str(kernel.dtype) == expected
    tensors = {name: state[name].float().numpy() for name in names}
    np.testing.assert_array_equal(kernel.astype(np.float32), fused(tensors, names))
    assert plan.nbytes() == sum(leaf.nbytes for leaf in leaves.values())


def test_numbers_that_a_type_cannot_hold_are_named(framepack, tmp_path) -> None:
    state = dict(framepack.state_dict())
    state["proj_out.bias"] = state["proj_out.bias"].clone()
    state["proj_out.bias"][:2] = 70_000
    save_file(state, tmp_path / "x.safetensors")
    plan = plan_of(tmp_path / "x.safetensors", rope_axes=(4, 6, 6))
    with pytest.raises(ConversionError, match=r"head/out/bias holds 2 numbers .* up to 7e\+04"):
        list(plan.leaves("float16"))
    list(plan.leaves("bfloat16"))


# What does not fit


def test_names_are_gone_through_once(tmp_path, monkeypatch) -> None:
    """However many tensors are missing."""
    with torch.device("meta"):
        state = HunyuanVideoFramepackTransformer3DModel(
            **SIZES, has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True
        ).state_dict()
    names, calls = weight_files.Checkpoint.names, []
    monkeypatch.setattr(
        weight_files.Checkpoint, "names", lambda self: calls.append(1) or names(self)
    )
    counts = []
    for whole in (True, False):
        kept = {k: v for k, v in state.items() if whole or ".norm" not in k}
        source = tables.recognise(abstract_checkpoint(kept, tmp_path), "transformer")
        calls.clear()
        source = dataclasses.replace(source, overrides={"rope_axes": (4, 6, 6)})
        problems = engine._problems(source, CFG, engine.steps_of(source.table, CFG))
        assert whole != bool(problems)
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 2


@pytest.mark.parametrize("field", ["heads", "norm_groups"])
def test_sizes_that_make_no_network(field: str, autoencoder, framepack, tmp_path) -> None:
    model, role = (autoencoder, "vae") if field == "norm_groups" else (framepack, "transformer")
    source = tables.recognise(
        weight_files.open_checkpoint(write_folder(model, tmp_path / role)), role
    )
    cfg = dataclasses.replace(source.table.config(source), **{field: 0})
    source = dataclasses.replace(
        source, table=dataclasses.replace(source.table, config=lambda _: cfg)
    )
    with pytest.raises(ConversionError, match=rf"{role}: its sizes make no .*{field}=0"):
        engine.plan(source)


def test_everything_wrong_is_told_at_once(framepack, tmp_path) -> None:
    write_folder(framepack, tmp_path / "model")
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    state = {
        k: v for k, v in framepack.state_dict().items() if "single_transformer_blocks.1" not in k
    }
    del state["proj_out.bias"]
    state["norm_out.linear.weight"] = torch.zeros(64, 31)
    state["transformer_blocks.0.extra.weight"] = torch.zeros(1)
    state["context_embedder.proj_in.bias"] = torch.zeros(32, dtype=torch.int8)
    save_file(state, file)
    with pytest.raises(ConversionError) as error:
        plan_of(tmp_path / "model")
    for part in (
        str(tmp_path / "model"),
        "layers absent (1): single_transformer_blocks.1\n",
        "tensors missing (1): proj_out.bias\n",
        "norm_out.linear.weight is (64, 31), expected (64, 32)",
        "context_embedder.proj_in.bias is I8",
        "no place for (1): transformer_blocks.0.extra.weight",
    ):
        assert part in str(error.value)


def test_layer_gaps_show_without_a_config(framepack, tmp_path) -> None:
    state = {k: v for k, v in framepack.state_dict().items() if "transformer_blocks.0" not in k}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=r"absent \(2\): transformer_blocks\.0, single_"):
        plan_of(tmp_path / "x.safetensors", rope_axes=(4, 6, 6))


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_condition_type", "token_replace"), ("qk_norm", "layer_norm"), ("patch_size", 4)],
)
def test_unsupported_transformers_are_refused_by_name(field, value, framepack, tmp_path) -> None:
    write_folder(framepack, tmp_path / "model")
    edit_config(tmp_path / "model", {field: value})
    with pytest.raises(ConversionError, match=f"{field} = {value!r}"):
        plan_of(tmp_path / "model")


def test_unsupported_encoders_are_refused_by_name(autoencoder, tmp_path) -> None:
    write_folder(autoencoder, tmp_path / "vae")
    edit_config(tmp_path / "vae", {"act_fn": "gelu"})
    with pytest.raises(ConversionError, match="act_fn = 'gelu'"):
        plan_of(tmp_path / "vae", "vae")
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    config = transformers.LlamaConfig(**LLAMA, rope_parameters=scaled)
    write_folder(transformers.LlamaModel(config), tmp_path / "llama")
    with pytest.raises(ConversionError, match="rope_type = 'llama3'"):
        plan_of(tmp_path / "llama", "text_encoder")
    config = transformers.CLIPTextConfig(**CLIP, hidden_act="relu")
    write_folder(transformers.CLIPTextModel(config), tmp_path / "clip")
    with pytest.raises(ConversionError, match="hidden_act = 'relu'"):
        plan_of(tmp_path / "clip", "text_encoder_2")


def edit_config(folder: Path, changes: dict) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_checkpoint_of_another_role_is_told(autoencoder, tmp_path) -> None:
    write_folder(autoencoder, tmp_path / "vae")
    with pytest.raises(ConversionError, match="looks like a HunyuanVideo VAE: give it as --vae"):
        plan_of(tmp_path / "vae", "text_encoder")


def damaged(tmp_path: Path, model) -> dict[str, tuple[Path, str]]:
    """Bad input -> (its path, what the message says)."""
    whole = write_folder(model, tmp_path / "whole") / "diffusion_pytorch_model.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    page = tmp_path / "page.pt"
    page.write_text("<html>not found</html>")
    pickled = tmp_path / "pickled.pt"
    torch.save({"x": Path("code")}, pickled)
    misnamed = {}
    for suffix, held in {
        ".safetensors": b"", ".pt": b"", ".bin": b"Entry not found",
        ".sft": b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>",
        ".ckpt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 25750000000\n",
        ".gguf": b"GGUF" + bytes(40), ".pth": whole.read_bytes(),
    }.items():  # fmt: skip
        misnamed[suffix] = tmp_path / f"misnamed{suffix}"
        misnamed[suffix].write_bytes(held)
    for name, zipped in (("new", True), ("old", False)):
        misnamed[name] = tmp_path / f"{name}.safetensors"
        torch.save(model.state_dict(), misnamed[name], _use_new_zipfile_serialization=zipped)
    misnamed["zip"] = tmp_path / "zip.safetensors"
    with zipfile.ZipFile(misnamed["zip"], "w") as archive:
        archive.writestr("model.safetensors", b"")
    numbers = tmp_path / "numbers.pt"
    torch.save({"loss": 3.0}, numbers)
    cut_pt = tmp_path / "cut.pt"
    torch.save(model.state_dict(), cut_pt)
    cut_pt.write_bytes(cut_pt.read_bytes()[:-100])
    lost = write_sharded(model, tmp_path / "lost")
    sorted(lost.glob("*.safetensors"))[1].unlink()
    lying = write_sharded(model, tmp_path / "lying")
    index = next(lying.glob("*.json.index.json"), next(lying.glob("*.index.json")))
    fields = json.loads(index.read_text())
    fields["weight_map"]["ghost"] = next(iter(fields["weight_map"].values()))
    index.write_text(json.dumps(fields))
    several = write_folder(model, tmp_path / "several")
    (several / "other.safetensors").write_bytes(whole.read_bytes())
    (tmp_path / "empty").mkdir()
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / "__0_0.distcp").touch()
    (tmp_path / "notes.txt").write_text("names")
    return {
        "cut": (cut, "no complete safetensors file"),
        "page": (page, "is a web page"),
        "pickled": (pickled, "plain tensors"),
        "numbers": (numbers, "no state dict"),
        "cut.pt": (cut_pt, "no complete PyTorch checkpoint"),
        "lost": (lost, "download the missing shards"),
        "lying": (lying, "do not hold: ghost"),
        "several": (several, "give the path of one file"),
        "empty": (tmp_path / "empty", "has no checkpoint"),
        "dcp": (tmp_path / "dcp", "format_utils dcp_to_torch"),
        "absent": (tmp_path / "absent", "does not exist"),
        "notes": (tmp_path / "notes.txt", "is not a checkpoint"),
        "no bytes": (misnamed[".safetensors"], "is empty; download it again"),
        "no bytes.pt": (misnamed[".pt"], "is empty; download it again"),
        "answer": (misnamed[".bin"], "is a text file, .* begins 'Entry not found'"),
        "sign in": (misnamed[".sft"], "is a web page"),
        "pointer": (misnamed[".ckpt"], "is a Git LFS pointer to 25,750.0 MB, .*git lfs pull"),
        "gguf": (misnamed[".gguf"], "is a GGUF file"),
        "safetensors.pth": (misnamed[".pth"], r"is a safetensors file .* end in \.safetensors"),
        "new.pt": (misnamed["new"], r"is a PyTorch file .* end in \.pt"),
        "old.pt": (misnamed["old"], r"is a PyTorch file .* end in \.pt"),
        "zip": (misnamed["zip"], "is a zip archive; unpack it"),
    }


def test_bad_files_are_named(base, tmp_path) -> None:
    for name, (path, said) in damaged(tmp_path, base).items():
        with pytest.raises(ConversionError, match=said) as error:
            weight_files.open_checkpoint(path)
        assert str(path) in str(error.value), name


@pytest.mark.golden
def test_a_tokenizer_that_is_a_pointer_is_named(golden, framepack, tmp_path) -> None:
    """Before the bundle is written, and not when it is sampled from."""
    shutil.copytree(
        golden / "diffusers_pipeline" / "pipeline" / "tokenizer", tmp_path / "tokenizer"
    )
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 9100000\n"
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(pointer)
    flags = BundleRequest(
        output=str(tmp_path / "out"), transformer=write_folder(framepack, tmp_path / "model"),
        tokenizer=tmp_path / "tokenizer",
    )  # fmt: skip
    with pytest.raises(ConversionError, match=r"tokenizer\.json is a Git LFS pointer to 9\.1 MB"):
        make_bundle(flags)
    assert not (tmp_path / "out").exists()


def test_pt_without_torch_names_the_extra(tmp_path, monkeypatch) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConversionError, match=r"pip install 'framepack-jax\[torch\]'"):
        weight_files.open_checkpoint(tmp_path / "x.pt")


def test_few_tensors_are_read_at_a_time(framepack, tmp_path, monkeypatch) -> None:
    """Opening and planning read no weights, and leaves are made little before they are asked for,
    each of three tensors at most."""
    path = write_folder(framepack, tmp_path / "model")
    read = []
    original = weight_files.Checkpoint.read
    monkeypatch.setattr(
        weight_files.Checkpoint,
        "read",
        lambda self, name: read.append(name) or original(self, name),
    )
    leaves = plan_of(path).leaves()
    assert read == []
    next(leaves)
    time.sleep(0.5)
    few = len(read)
    assert 1 <= few <= 3 * (1 + prefetch.AHEAD)
    list(leaves)
    assert len(read) > 2 * few


# From a base model


@pytest.mark.parametrize("kernel", ["k1", "k2", "k4", "k8", "k1h4w4"])
def test_from_base_embeds_enlarged_latents_alike(kernel: str, base, tmp_path) -> None:
    source = tables.recognise(
        weight_files.open_checkpoint(write_folder(base, tmp_path / "m")), "transformer"
    )
    table = transformer.from_base(source.table, (kernel,), 10)
    plan = engine.plan(dataclasses.replace(source, table=table))
    leaves = dict(plan.leaves())
    assert plan.cfg == dataclasses.replace(CFG, context_kernels=(kernel,))
    shape = kernel_shape(kernel)
    small = np.random.default_rng(0).standard_normal((1, 3, 4, 6, 16)).astype(np.float32)
    times = (shape[0], shape[1] // 2, shape[2] // 2)
    large = small
    for axis, n in enumerate(times, 1):
        large = np.repeat(large, n, axis=axis)
    embed = ContextEmbed(plan.cfg)

    def tokens(name: str, latents: np.ndarray, kernel: str) -> jax.Array:
        params = {k: jnp.asarray(leaves[f"embed/{name}/{k}"]) for k in ("kernel", "bias")}
        return embed.apply({"params": params}, jnp.asarray(latents), kernel)

    ours, theirs = tokens(f"context_{kernel}", large, kernel), tokens("patch", small, "k1")
    assert relative_error(ours, theirs) < 1e-5


def test_from_base_keeps_the_rest(base, framepack, tmp_path) -> None:
    path = write_folder(base, tmp_path / "base")
    make_bundle(
        BundleRequest(output=f"{tmp_path}/b", transformer=path, from_base=True, image_dim=10)
    )
    manifest = bundle.read_manifest(tmp_path / "b")
    _, cfg = bundle.role_config(manifest, "transformer")
    assert cfg == CFG
    params = bundle.load_params(tmp_path / "b", manifest, "transformer")
    plain = dict(plan_of(path).leaves())
    embed = params["embed"]
    np.testing.assert_array_equal(embed["context_k1"]["kernel"], plain["embed/patch/kernel"])
    np.testing.assert_array_equal(embed["context_k4"]["bias"], plain["embed/patch/bias"])
    np.testing.assert_array_equal(
        params["double"]["img_mod"]["bias"][1], plain["double/01/img_mod/bias"]
    )
    assert not np.any(embed["image_down"]["kernel"]) and not np.any(embed["image_up"]["bias"])
    assert 0.8 < np.std(embed["image_up"]["kernel"]) * math.sqrt(10) < 1.2
    with pytest.raises(ConversionError, match="FramePack model already"):
        path = write_folder(framepack, tmp_path / "framepack")
        make_bundle(BundleRequest(output=f"{tmp_path}/c", transformer=path, from_base=True))


# Tencent's files


@pytest.fixture(scope="module")
def original(golden, tmp_path_factory) -> Path:
    """A bundle of Tencent's own files."""
    output = tmp_path_factory.mktemp("original") / "bundle"
    folder = golden / "hunyuan_original"
    args = ["--transformer", str(folder / "mp_rank_00_model_states.pt"), "--rope-axes", "4,6,6"]
    args += ["--vae", str(folder / "pytorch_model.pt"), "--output", str(output)]
    main(args)
    return output


@pytest.mark.golden
def test_original_transformer_agrees(original, golden) -> None:
    reference = load_file(golden / "hunyuan_original" / "reference.safetensors")
    manifest = bundle.read_manifest(original)
    _, cfg = bundle.role_config(manifest, "transformer")
    assert cfg.context_kernels == () and cfg.image_dim is None and cfg.guidance
    params = bundle.load_params(original, manifest, "transformer")
    x = np.moveaxis(reference["latents"], 1, -1)
    conditions = Conditions(
        jnp.asarray(reference["text"]), jnp.asarray(reference["text_mask"] != 0),
        jnp.asarray(reference["pooled"]), None, jnp.asarray(reference["guidance"] / 1000),
    )  # fmt: skip
    context = PackedContext((), (), jnp.arange(x.shape[1])[None, :], ())
    sigma = jnp.asarray(reference["timestep"] / 1000)
    ours = TRANSFORMER.velocity(cfg, params, jnp.asarray(x), sigma, context, conditions)
    assert relative_error(np.moveaxis(ours, -1, 1), reference["output"]) <= PARITY


@pytest.mark.golden
def test_original_vae_agrees(original, golden) -> None:
    reference = load_file(golden / "hunyuan_original" / "reference.safetensors")
    manifest = bundle.read_manifest(original)
    _, cfg = bundle.role_config(manifest, "vae")
    params = bundle.load_params(original, manifest, "vae")
    whole = Tiling(frames=None)
    pixels = jnp.asarray(np.moveaxis(reference["vae_pixels"], 1, -1))
    mean, logvar = vae.encode(cfg, params, pixels, whole)
    decoded = vae.decode(cfg, params, jnp.asarray(np.moveaxis(reference["vae_mean"], 1, -1)), whole)
    ours = {"vae_mean": mean, "vae_logvar": logvar, "vae_decoded": decoded}
    for name, value in ours.items():
        assert relative_error(np.moveaxis(value, -1, 1), reference[name]) <= PARITY, name
    np.testing.assert_allclose(manifest.latent_std, [1 / 0.476986] * 16)


@pytest.mark.golden
def test_original_weights_are_all_used(golden) -> None:
    folder = golden / "hunyuan_original"
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    plan = plan_of(folder / "mp_rank_00_model_states.pt", rope_axes=(4, 6, 6))
    leaves = dict(plan.leaves())
    assert_every_number_moved_once(leaves, tensors)
    shift, scale = np.split(tensors["final_layer.adaLN_modulation.1.weight"], 2)
    np.testing.assert_array_equal(leaves["head/mod/kernel"], np.concatenate([scale, shift]).T)
    linear1 = tensors["single_blocks.2.linear1.weight"]
    np.testing.assert_array_equal(leaves["single/02/mlp_in/kernel"], linear1[96:].T)
    np.testing.assert_array_equal(leaves["single/02/qkv/kernel"][:, 1, 1, 0], linear1[32 + 16])
    linear2 = tensors["single_blocks.0.linear2.weight"]
    np.testing.assert_array_equal(leaves["single/00/attn_out/kernel"], linear2[:, :32].T)
    state = torch.load(folder / "pytorch_model.pt", weights_only=True)["state_dict"]
    leaves = dict(plan_of(folder / "pytorch_model.pt", "vae").leaves())
    assert_every_number_moved_once(leaves, {name: t.numpy() for name, t in state.items()})


@pytest.mark.golden
def test_narrow_heads_need_their_rope_axes(golden) -> None:
    with pytest.raises(ConversionError, match="--rope-axes"):
        plan_of(golden / "hunyuan_original" / "mp_rank_00_model_states.pt")


# The command


@pytest.mark.golden
def test_a_whole_pipeline_becomes_a_bundle(golden, tmp_path, capsys) -> None:
    folder = golden / "diffusers_pipeline" / "pipeline"
    output = tmp_path / "bundle"
    main(["--pipeline", str(folder), "--output", str(output), "--dtype", "bf16"])
    said = capsys.readouterr().out
    manifest = bundle.read_manifest(output)
    assert tuple(manifest.roles) == bundle.ROLES
    assert manifest.prompt_template == PROMPT_TEMPLATE and manifest.schedule.order == "inverted"
    for role in bundle.ROLES:
        leaves = jax.tree.leaves(bundle.load_params(output, manifest, role))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
        size = sum(leaf.nbytes for leaf in leaves)
        assert manifest.roles[role].source["bytes"] == size
        assert f"{size / 1e6:,.1f} MB from {role}" in said
    for name in ("tokenizer", "tokenizer_2"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (output / name / file).read_bytes() == (folder / name / file).read_bytes()
    assert (output / "image_processor" / "preprocessor_config.json").exists()
    assert not (output / "unfinished").exists()


@pytest.mark.golden
def test_a_fine_tune_points_to_the_encoders(golden, framepack, tmp_path) -> None:
    pipeline = golden / "diffusers_pipeline" / "pipeline"
    first, second = tmp_path / "first", tmp_path / "sub" / "second"
    make_bundle(BundleRequest(output=str(first), pipeline=pipeline, prompt_template="say {}"))
    f1 = "f1k1_x_f16k4f2k2f1k1_g3"
    flags = BundleRequest(
        output=str(second), transformer=pipeline / "transformer", encoders_from=str(first),
        schedule=f1,
    )  # fmt: skip
    manifest = make_bundle(flags)
    assert manifest == bundle.read_manifest(second)
    assert (manifest.schedule.order, manifest.prompt_template) == ("forward", "say {}")
    assert manifest.roles["vae"].path == "../../first/vae"
    for role in bundle.ROLES:
        bundle.load_params(second, manifest, role)
    assert not (second / "vae").exists() and (second / "tokenizer" / "tokenizer.json").exists()
    with pytest.raises(ConversionError, match="do not belong together"):
        path = write_folder(framepack, tmp_path / "other")
        make_bundle(dataclasses.replace(flags, transformer=path, output=f"{tmp_path}/third"))
    with pytest.raises(ConversionError, match="would be replaced"):
        make_bundle(dataclasses.replace(flags, output=str(first), overwrite=True))
    bundle.load_params(first, bundle.read_manifest(first), "vae")


def test_output_is_never_lost_by_accident(base, framepack, tmp_path) -> None:
    path = write_folder(framepack, tmp_path / "model")
    flags = BundleRequest(output=str(tmp_path / "out"), transformer=path)
    with pytest.raises(ConversionError, match="not empty"):
        make_bundle(dataclasses.replace(flags, output=str(tmp_path)))
    make_bundle(flags)
    with pytest.raises(ConversionError, match="--overwrite"):
        make_bundle(flags)
    with pytest.raises(ConversionError, match="lies in"):
        inside = write_folder(base, tmp_path / "out" / "vae")
        make_bundle(dataclasses.replace(flags, transformer=inside, overwrite=True))
    save_file({"x": torch.zeros(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(ConversionError):
        bad = tmp_path / "bad.safetensors"
        make_bundle(dataclasses.replace(flags, transformer=bad, overwrite=True))
    assert bundle.read_manifest(tmp_path / "out").roles["transformer"].config["image_dim"] == 10
    plain = write_folder(base, tmp_path / "base")
    make_bundle(dataclasses.replace(flags, transformer=plain, overwrite=True))
    assert bundle.read_manifest(tmp_path / "out").roles["transformer"].config["image_dim"] is None


def test_an_interrupted_conversion_is_no_bundle_and_runs_again(
    framepack, tmp_path, monkeypatch
) -> None:
    flags = BundleRequest(
        output=str(tmp_path / "out"), transformer=write_folder(framepack, tmp_path / "model")
    )

    def power_cut(*_) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(bundle, "write_params", power_cut)
        make_bundle(flags)
    with pytest.raises(bundle.BundleError, match="is not a bundle"):
        bundle.read_manifest(tmp_path / "out")
    assert make_bundle(flags) == bundle.read_manifest(tmp_path / "out")


def test_leftovers_of_a_killed_run_make_room_and_go(framepack, tmp_path, monkeypatch) -> None:
    output = tmp_path / "out"
    flags = BundleRequest(
        output=str(output), transformer=write_folder(framepack, tmp_path / "model")
    )
    made = make_bundle(flags)
    left = output / "vae.partial_save.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "data").write_bytes(bytes(1000))
    (output / "notes").mkdir()
    # Killed before the manifest of the bundle there was taken away.
    (output / bundle.UNFINISHED).touch()
    held = sum(f.stat().st_size for f in (output / "transformer").rglob("*") if f.is_file())
    freed = []
    check = engine.check_space
    monkeypatch.setattr(engine, "check_space", lambda *args: freed.append(args[2]) or check(*args))
    assert "bundle, unfinished" in inspect.describe(output)
    assert make_bundle(flags) == made
    assert freed == [held + 1000]
    assert not left.exists() and (output / "notes").exists()
    assert not (output / bundle.UNFINISHED).exists()


@pytest.mark.golden
def test_a_transformer_that_stays_keeps_its_schedule(golden, tmp_path, capsys) -> None:
    pipeline = golden / "diffusers_pipeline" / "pipeline"
    first, second = tmp_path / "first", tmp_path / "second"
    f1 = "f1k1_x_f16k4f2k2f1k1_g3"
    main(["--transformer", str(pipeline / "transformer"), "--output", str(first),
          "--schedule", f1])  # fmt: skip
    assert "assumed" not in capsys.readouterr().out
    small = dataclasses.replace(bundle.read_manifest(first), buckets=((64, 96),))
    bundle.write_manifest(first, small)
    args = ["--vae", str(pipeline / "vae"), "--encoders-from", str(first)]
    main([*args, "--output", str(second)])
    assert "assumed" not in capsys.readouterr().out
    made = bundle.read_manifest(second)
    assert (str(made.schedule), made.schedule.order, made.buckets) == (f1, "forward", ((64, 96),))
    main(["--transformer", str(pipeline / "transformer"), "--output", str(tmp_path / "third")])
    assert "(schedule assumed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "nothing to convert"),
        (["--framepack", "f1", "--pipeline", "."], "--framepack f1 brings all that --pipeline ."),
        (["--transformer", "{model}", "--image-dim", "4"], "--image-dim 4 is of"),
        (["--pipeline", "."], "no model_index.json"),
        (["--transformer", "{model}", "--rope-axes", "a"], "--rope-axes a"),
        (["--transformer", "{model}", "--rope-axes", "4,4,4"], "do not add up"),
        (["--transformer", "{model}", "--schedule", "f1k1_x_y"], "item 'y'"),
        (["--transformer", "{model}", "--schedule", "td_f1k8f1k1_g9"], "needs kernels k8"),
        (["--transformer", "{model}", "--prompt-template", "x"], "--prompt-template"),
        (["--image-encoder", "{siglip}"], "--image-processor"),
        (["--image-encoder", "{siglip}"], "is lllyasviel/flux_redux_bfl/feature_extractor"),
    ],
)
def test_user_errors_are_one_message(args, said, framepack, tmp_path) -> None:
    paths = {"model": tmp_path / "model", "siglip": tmp_path / "siglip"}
    write_folder(framepack, paths["model"])
    config = transformers.SiglipVisionConfig(**SIGLIP)
    write_folder(transformers.SiglipVisionModel(config), paths["siglip"])
    args = [arg.format(**paths) for arg in args]
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--output", str(tmp_path / "out")])
    assert stopped.value.code.startswith("error: ") and said in stopped.value.code
    assert not (tmp_path / "out").exists()


def test_a_base_model_is_said_to_be_no_framepack_model(base, tmp_path, capsys) -> None:
    path = write_folder(base, tmp_path / "base")
    main(["--transformer", str(path), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "no FramePack model" in said and "still without vae, text_encoder" in said


@pytest.mark.golden
def test_bundles_of_the_package_go_by_their_names(golden, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["inspect", "random"])
    assert "hunyuan_vae, 0.2 M, bf16" in capsys.readouterr().out
    cli.main(["export", "vae.safetensors", "--bundle", "random", "--role", "vae"])
    # Its config is the bundle's: the file is one of its widths.
    cli.main(["verify", "vae.safetensors", "random"])
    assert "differs" not in capsys.readouterr().out
    flags = ["--transformer", str(golden / "transformer"), "--output", "out", "--encoders-from"]
    main([*flags, "random"])
    manifest = bundle.read_manifest("out")
    bundle.check_present("out")
    assert (
        manifest.roles["vae"].source
        == bundle.read_manifest(bundle.resolve("random")).roles["vae"].source
    )
    with pytest.raises(SystemExit, match="framepack_f1: the parameters of vae are missing"):
        main([*flags, "framepack_f1", "--overwrite"])
    assert bundle.read_manifest("out") == manifest


def test_help_explains_every_flag(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for field in dataclasses.fields(BundleRequest):
        assert f"--{field.name.replace('_', '-')}" in text
    for words in ("diffusers pipeline folder", "Tencent", "f1k1_x_f16k4f2k2f1k1_g9", "16,56,56"):
        assert words in text
