"""Checkpoints of other programs: names of ComfyUI and Kijai, prefixes of wrappers, several networks
or sets of weights in one file, 8-bit floats, repackaged encoders; and their `framepack inspect`."""

import dataclasses
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from safetensors.torch import save_file

from framepack_jax import bundle
from framepack_jax.cli.convert import main
from framepack_jax.conversion import encoders, engine, export, float8, inspect, tables, weight_files
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.verify import compare
from framepack_jax.conversion.weight_files import ConversionError, Entry
from tests.fixtures.checkpoints import LLAMA, RELEASED, SIZES, assert_same, plan_of
from tests.fixtures.comfyui import State, comfyui
from tests.fixtures.torch_reference import randomize

FP8 = torch.float8_e4m3fn
AXES = {"rope_axes": (4, 6, 6)}


@pytest.fixture(scope="module")
def framepack() -> State:
    """A toy FramePack model in the release's names, bfloat16."""
    model = HunyuanVideoFramepackTransformer3DModel(
        **SIZES, has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True
    )
    state = randomize(model, 1).state_dict()
    return {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def tencent(golden) -> State:
    """A toy of Tencent's own code."""
    file = golden / "hunyuan_original" / "mp_rank_00_model_states.pt"
    return torch.load(file, weights_only=True)["module"]


def write(state: State, file: Path, prefix: str = "", **metadata: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    named = {prefix + name: tensor.contiguous() for name, tensor in state.items()}
    save_file(named, file, metadata=metadata or None)
    return file


def leaves_of(path: Path, role: str = "transformer", **given) -> dict[str, np.ndarray]:
    return dict(plan_of(path, role, **given).leaves())


# Names


@pytest.mark.golden
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.model."])
def test_single_files_hold_what_tencents_does(prefix: str, tencent, tmp_path) -> None:
    expected = leaves_of(write(tencent, tmp_path / "tencent.safetensors"), **AXES)
    renamed = comfyui(tencent)
    # Later versions of ComfyUI call the weight of a norm a weight.
    later = {n.replace("_norm.scale", "_norm.weight"): t for n, t in renamed.items()}
    assert later.keys() != renamed.keys()
    for name, state in {"kept": tencent, "renamed": renamed, "later": later}.items():
        plan = plan_of(write(state, tmp_path / f"{name}.safetensors", prefix), **AXES)
        assert_same(dict(plan.leaves()), expected)
        naming = "Tencent's" if name == "kept" else "ComfyUI's"
        assert plan.source.table.description == f"HunyuanVideo transformer in {naming} naming"


@pytest.mark.golden
def test_a_framepack_model_in_tencents_names(tencent, framepack, tmp_path) -> None:
    """As trainers that keep to Tencent's code save one."""
    added = {n: t for n, t in framepack.items() if n.startswith(("clean_x", "image_proj"))}
    plan = plan_of(write(tencent | added, tmp_path / "x.safetensors"), **AXES)
    assert (plan.cfg.context_kernels, plan.cfg.image_dim) == (("k1", "k2", "k4"), 10)
    leaves, base = (
        dict(plan.leaves()),
        leaves_of(write(tencent, tmp_path / "y.safetensors"), **AXES),
    )
    assert_same({path: leaves[path] for path in base}, base)
    theirs = framepack["image_projection.up.weight"].float().numpy()
    np.testing.assert_array_equal(leaves["embed/image_up/kernel"].astype(np.float32), theirs.T)


@pytest.mark.golden
def test_a_framepack_model_begins_from_comfyuis_file(tencent, tmp_path) -> None:
    file = write(comfyui(tencent), tmp_path / "base.safetensors", "model.model.")
    flags = BundleRequest(
        output=str(tmp_path / "out"), transformer=file, from_base=True, rope_axes="4,6,6"
    )
    assert make_bundle(flags).roles["transformer"].config["context_kernels"] == ["k1", "k2", "k4"]


def test_released_names_behind_a_prefix(framepack, tmp_path) -> None:
    bare, behind = (
        leaves_of(write(framepack, tmp_path / f"{i}.safetensors", prefix), **AXES)
        for i, prefix in enumerate(["", "model.diffusion_model."])
    )
    assert_same(behind, bare)


@pytest.mark.parametrize("axes", [(5, 5, 6), (0, 8, 8), (-2, 10, 8)])
def test_rope_axes_are_even_and_above_0(axes, framepack, tmp_path) -> None:
    """These add up to the width of a head."""
    file = write(framepack, tmp_path / "x.safetensors")
    said = rf"rope_axes.* above 0|RoPE axes {','.join(map(str, axes))} are not all even and above 0"
    with pytest.raises(ConversionError, match=said):
        plan_of(file, rope_axes=axes)
    (tmp_path / "config.json").write_text(
        json.dumps({"num_attention_heads": 2, "rope_axes_dim": 16})
    )
    with pytest.raises(ConversionError, match="rope_axes = 16: expected a list of 3"):
        plan_of(file)


# ComfyUI's VAE


def comfyui_vae_name(name: str, blocks: int = 4) -> str:
    """Name in ComfyUI's VAE of a tensor of diffusers'. ComfyUI counts the decoder's blocks from the
    finest."""
    substitutions = (
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    )
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    return name


def comfyui_vae(state: State, blocks: int = 4) -> State:
    """The tensors of diffusers' VAE as ComfyUI keeps them: attention in 1x1x1 convolutions."""
    return {
        comfyui_vae_name(name, blocks): tensor[..., None, None, None]
        if "attentions" in name and tensor.ndim == 2
        else tensor
        for name, tensor in state.items()
    }


def test_comfyuis_vae_holds_what_diffusers_does(tmp_path) -> None:
    model = AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=5,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3, spatial_compression_ratio=4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
    )  # fmt: skip
    randomize(model, 3).save_pretrained(tmp_path / "diffusers")
    renamed = comfyui_vae(model.state_dict(), blocks=3)
    shapes = {name: tuple(tensor.shape) for name, tensor in renamed.items()}
    for name, shape in {
        "encoder.down.0.downsample.conv.conv.weight": (4, 4, 3, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.conv.weight": (8, 4, 1, 1, 1),
        "encoder.mid.attn_1.q.weight": (8, 8, 1, 1, 1),
        "decoder.mid.block_2.conv1.conv.bias": (8,),
        "decoder.up.0.block.0.nin_shortcut.conv.weight": (4, 8, 1, 1, 1),
        "decoder.up.2.upsample.conv.conv.weight": (8, 8, 3, 3, 3),
        "decoder.norm_out.weight": (4,),
    }.items():
        assert shapes[name] == shape
    file = write(renamed, tmp_path / "comfyui" / "vae.safetensors", "first_stage_model.")
    with pytest.raises(ConversionError, match=r"with channels \(4, 8, 8\) needs its config\.json"):
        plan_of(file, "vae")
    model.save_config(file.parent)
    plan, expected = plan_of(file, "vae"), plan_of(tmp_path / "diffusers", "vae")
    assert plan.cfg == expected.cfg
    assert plan.source.table.description == "HunyuanVideo VAE in ComfyUI's naming"
    assert_same(dict(plan.leaves()), dict(expected.leaves()))


# Prefixes


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module._orig_mod.{name}",
    "unknown": lambda name: f"student.net_2.{name}",
    "FSDP": lambda name: re.sub(
        r"(blocks\.\d\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", f"model.{name}"
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_wrappers_add_to_names_is_taken_off(wrapper: str, framepack, tmp_path, capsys) -> None:
    """Off weights in bfloat16 and in scaled 8-bit floats, in one file or several."""
    stored, meant = scaled(framepack, "()")
    expected = leaves_of(write(meant, tmp_path / "bare.safetensors"), **AXES)
    renamed = {WRAPPED[wrapper](name): tensor for name, tensor in stored.items()}
    file = write(renamed, tmp_path / "wrapped.safetensors")
    assert_same(leaves_of(file, **AXES), expected)
    names = sorted(renamed)
    places = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(places.values()):
        write({n: renamed[n] for n in names if places[n] == part}, tmp_path / "shards" / part)
    index = json.dumps({"weight_map": places})
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(index)
    assert_same(leaves_of(tmp_path / "shards", **AXES), expected)
    main(["--transformer", str(file), "--output", str(tmp_path / "out"), "--rope-axes", "4,6,6"])
    said = capsys.readouterr().out
    assert {
        "compiled": "_orig_mod. taken out of names",
        "DDP": "prefix module. removed",
        "unknown": "prefix student.net_2. removed",
        "FSDP": "_checkpoint_wrapped_module., _fsdp_wrapped_module. taken out of names",
    }[wrapper] in said


def test_averaged_weights_are_never_guessed(framepack, tmp_path, capsys) -> None:
    """A trainer's file with plain weights, averaged ones, and what else it keeps."""
    averaged = {name: tensor + 1 for name, tensor in framepack.items()}
    trainer = {
        "model": dict(framepack), "ema": {"module": averaged}, "step": 7,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "groups": [1]},
    }  # fmt: skip
    file = tmp_path / "trainer.pt"
    torch.save(trainer, file)
    with pytest.raises(ConversionError, match=r"with --prefix ema\.module\. or --prefix model\.$"):
        plan_of(file)
    flags = ["--transformer", str(file), "--rope-axes", "4,6,6", "--output"]
    with pytest.raises(SystemExit, match=r"choose one with --prefix ema\.module\. or"):
        main([*flags, str(tmp_path / "out"), "--prefix", "student"])
    main([*flags, str(tmp_path / "out"), "--prefix", "ema.module"])
    said = capsys.readouterr().out
    assert "prefix ema.module. removed; optimizer.state.0.exp_avg left out" in said
    plain = write(framepack, tmp_path / "plain.safetensors")
    ema = write(averaged, tmp_path / "ema.safetensors")
    assert [bool(compare(f, str(tmp_path / "out"))[0].differing) for f in (plain, ema)] == [1, 0]
    # Averaged weights alone are what there is.
    torch.save({"ema": averaged, "step": 7}, file)
    assert_same(leaves_of(file, **AXES), leaves_of(ema, **AXES))
    assert "PyTorch; its dict 'ema'" in inspect.describe(file)
    with pytest.raises(SystemExit, match=r"--prefix model\.: no network .* are behind ''"):
        main([*flags, str(tmp_path / "other"), "--prefix", "model."])


def test_plain_weights_beside_averaged_ones(framepack, tmp_path) -> None:
    """The plain ones behind no prefix: those averaged are no strange tensors of theirs."""
    both = framepack | {f"ema.{name}": tensor + 1 for name, tensor in framepack.items()}
    file = write(both, tmp_path / "both.safetensors")
    with pytest.raises(ConversionError, match=r"choose one with --prefix '' or --prefix ema\.$"):
        plan_of(file)
    assert inspect.describe(file).count("transformer in diffusers' naming") == 2
    source = tables.recognise(weight_files.open_checkpoint(file), "transformer", "")
    leaves = dict(engine.plan(dataclasses.replace(source, overrides=AXES)).leaves())
    assert_same(leaves, leaves_of(write(framepack, tmp_path / "plain.safetensors"), **AXES))


# Whole checkpoints


def llama_state(root: Path, manifest: bundle.Manifest) -> State:
    """The text encoder of a bundle as its checkpoint was, but for the last layers, which a bundle
    does not keep."""
    _, cfg = bundle.role_config(manifest, "text_encoder")
    state = {}
    for step in engine.steps_of(encoders.LLAMA, cfg):
        held = bundle.read_leaves(root, manifest, "text_encoder", step.targets)
        leaves = [leaf for _, leaf in held]
        arrays = export.invert(step.row.transform, leaves, step.source_shapes())
        state |= dict(zip(step.sources, map(as_torch, arrays), strict=True))
    for name in [name for name in state if name.startswith("layers.0.")]:
        for unread in range(cfg.layers, cfg.layers + encoders.UNUSED_LAYERS):
            state[name.replace("layers.0.", f"layers.{unread}.")] = torch.zeros(state[name].shape)
    return state | {"norm.weight": torch.zeros(cfg.width)}


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype != ml_dtypes.bfloat16:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The networks of the bundle `random`, but for the image encoder, in one file as ComfyUI saves
    them."""
    root = bundle.resolve("random")
    manifest = bundle.read_manifest(root)

    def exported(role: str) -> State:
        network = export.Export(root, manifest, role)
        names = [tensor.name for tensor in network.tensors]
        return dict(zip(names, map(as_torch, network.arrays()), strict=True))

    networks = {
        "model.diffusion_model.": exported("transformer"),
        "vae.": comfyui_vae(exported("vae")),
        "text_encoders.llama.transformer.model.": llama_state(root, manifest),
        "text_encoders.clip_l.transformer.": exported("text_encoder_2"),
        "text_encoders.clip_l.": {"logit_scale": torch.tensor(4.6)},
        "": {"text_encoders.llama.transformer.scaled_fp8": torch.zeros(2, dtype=FP8)},
    }
    state = {p + name: tensor for p, held in networks.items() for name, tensor in held.items()}
    return write(state, tmp_path_factory.mktemp("whole") / "all_in_one.safetensors")


ENCODERS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def test_a_whole_checkpoint_is_taken_apart(whole, tmp_path, capsys) -> None:
    flags = ["--pipeline", str(whole), "--encoders-from", "random"]
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--output", str(tmp_path / "out")])
    assert "--tokenizer;" in stopped.value.code and "--tokenizer-2;" in stopped.value.code
    for name in ("tokenizer", "tokenizer_2"):
        flags += [f"--{name.replace('_', '-')}", str(bundle.resolve("random") / name)]
    main([*flags, "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    for prefix in (
        "model.diffusion_model.",
        "vae.",
        "text_encoders.clip_l.transformer.text_model.",
    ):
        assert f"prefix {prefix} removed" in said
    manifest = bundle.read_manifest(tmp_path / "out")
    assert [r for r in bundle.ROLES if manifest.roles[r].path == r] == list(ENCODERS)
    for root in (tmp_path / "out", bundle.resolve("random")):
        results = compare(whole, str(root))
        assert [(r.role, r.differing) for r in results] == [(role, []) for role in ENCODERS]
    main(["--vae", str(whole), "--encoders-from", "random", "--output", str(tmp_path / "vae")])
    said = capsys.readouterr().out
    assert "also holds transformer, text_encoder, text_encoder_2; to convert all" in said
    # Without a bundle the toy encoders' sizes are not known; a real one's are.
    said = inspect.describe(whole)
    assert said.count("  prefix ") == 4 and f"convert with --pipeline {whole}" in said


def test_a_whole_checkpoint_of_released_sizes_fits_without_a_config(framepack, tmp_path) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo().state_dict()
    entries = {f"vae.{n}": entry(tuple(t.shape)) for n, t in comfyui_vae(vae).items()}
    for role, place in (("text_encoder", "llama"), ("text_encoder_2", "clip_l")):
        prefix = f"text_encoders.{place}.transformer."
        entries |= {prefix + name: held for name, held in repackaged(role).items()}
    entries |= {
        f"model.model.{name}": entry(tuple(tensor.shape)) for name, tensor in framepack.items()
    }
    entries["model.model.transformer_blocks.0.ff.net.2.weight"] = entry((32, 64), "float8_e4m3fn")
    path = tmp_path / "whole.safetensors"
    # The weights of Llama alone are marked as scaled.
    entries, _ = float8.unpack(path, [], entries)
    # Belongs to none of them.
    (tmp_path / "config.json").write_text("{}")
    found = tables.networks(weight_files.Checkpoint(path, [], entries))
    assert list(found) == list(ENCODERS)
    for role in ENCODERS[1:]:
        (source,) = found[role]
        engine.plan(source)
    (source,) = found["transformer"]
    plan = engine.plan(dataclasses.replace(source, overrides=AXES))
    assert plan.cfg.context_kernels == ("k1", "k2", "k4")


# 8-bit floats


def packed(state: State, dtype: torch.dtype = FP8) -> State:
    """As Kijai packs: matrices of the blocks in 8 bits, the rest as it was."""
    return {
        name: tensor.to(dtype) if tensor.ndim == 2 and "blocks" in name else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_plain_8_bit_weights_are_their_values(dtype, framepack, tmp_path) -> None:
    state = packed(framepack, dtype)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    plan = plan_of(write(state, tmp_path / "x.safetensors"), **AXES)
    assert_same(dict(plan.leaves()), leaves_of(write(expected, tmp_path / "y.safetensors"), **AXES))
    count = sum(tensor.dtype == dtype for tensor in state.values())
    name = str(dtype).removeprefix("torch.")
    said = f"safetensors; {count} tensors {name}, 0 of them scaled, read as bfloat16"
    assert plan.source.checkpoint.format == said


def scaled(state: State, shape: str) -> tuple[State, State]:
    """(8-bit weights and their scales, what they stand for in bfloat16)."""
    stored, meant = {}, {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or "blocks" not in name:
            stored[name] = meant[name] = tensor
            continue
        scale = tensor.float().abs().amax(dim=1, keepdim=True) / 448
        scale = scale if shape == "rows" else scale.max().reshape(() if shape == "()" else (1,))
        stored[name] = (tensor.float() / scale).to(FP8)
        meant[name] = (stored[name].float() * scale).to(torch.bfloat16)
        stored[name.removesuffix("weight") + "scale_weight"] = scale
    return stored, meant


@pytest.mark.parametrize("shape", ["()", "(1,)", "rows"])
def test_scaled_8_bit_weights_are_multiplied(shape: str, framepack, tmp_path) -> None:
    stored, meant = scaled(framepack, shape)
    expected = leaves_of(write(meant, tmp_path / "meant.safetensors"), **AXES)
    stored["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    stored["transformer_blocks.0.attn.to_q.scale_input"] = torch.tensor(1.0)
    plan = plan_of(write(stored, tmp_path / "x.safetensors", "model.diffusion_model."), **AXES)
    assert_same(dict(plan.leaves()), expected)
    assert {leaf.dtype for leaf in dict(plan.leaves()).values()} == {np.dtype(ml_dtypes.bfloat16)}


def comfy_quant(stored: State, note: dict) -> State:
    """The later spelling of ComfyUI: a note at each layer."""
    state = {}
    for name, tensor in stored.items():
        state[name.replace(".scale_weight", ".weight_scale")] = tensor
        if name.endswith(".scale_weight"):
            data = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
            state[name.replace(".scale_weight", ".comfy_quant")] = data
    return state


def test_comfyuis_later_spelling_of_scales(framepack, tmp_path) -> None:
    stored, meant = scaled(framepack, "()")
    expected = leaves_of(write(meant, tmp_path / "meant.safetensors"), **AXES)
    state = comfy_quant(stored, {"format": "float8_e4m3fn"})
    assert_same(leaves_of(write(state, tmp_path / "x.safetensors"), **AXES), expected)
    state = comfy_quant(stored, {"format": "nvfp4"})
    with pytest.raises(ConversionError, match=r"comfy_quant says 'nvfp4'; supported are float8"):
        plan_of(write(state, tmp_path / "x.safetensors"), **AXES)
    # A layer with a note is never read as it stands.
    state = comfy_quant(stored, {"format": "float8_e4m3fn"})
    del state["single_transformer_blocks.1.proj_mlp.weight_scale"]
    with pytest.raises(ConversionError, match=r"1 have no scale: single_.*\.1\.proj_mlp\.weight"):
        plan_of(write(state, tmp_path / "x.safetensors"), **AXES)


def test_every_8_bit_number_times_a_scale_is_rounded_once(tmp_path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    codes = codes[codes.float().isfinite()]
    for scale in (1.0, 0.3, 1e-5):
        state = {"a.weight": codes, "a.scale_weight": torch.tensor(scale)}
        checkpoint = weight_files.open_checkpoint(write(state, tmp_path / "x.safetensors"))
        assert checkpoint.names() == ["a.weight"]
        read = checkpoint.read("a.weight").view(np.int16)
        meant = (codes.float() * torch.tensor(scale)).to(torch.bfloat16).view(torch.int16)
        np.testing.assert_array_equal(read, meant.numpy())


def test_scales_that_are_absent_or_do_not_fit_are_named(framepack, tmp_path) -> None:
    stored, _ = scaled(framepack, "()")
    stored["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    name = "single_transformer_blocks.1.proj_mlp.scale_weight"
    scale = stored.pop(name)
    with pytest.raises(ConversionError, match=r"1 have no scale: single_.*\.1\.proj_mlp\.weight"):
        plan_of(write(stored, tmp_path / "x.safetensors"))
    stored[name] = scale.expand(3)
    with pytest.raises(ConversionError, match=r"proj_mlp\.weight is \(64, 32\), its scale \(3,\)"):
        plan_of(write(stored, tmp_path / "x.safetensors"))


@pytest.mark.golden
def test_tencents_8_bit_file_needs_its_scales(tencent, tmp_path) -> None:
    """`..._fp8.pt` holds numbers divided by scales that `..._fp8_map.pt` keeps."""
    ends = ("linear1.weight", "_attn_qkv.weight")
    modules = [name for name in tencent if name.endswith(ends) and "refiner" not in name]
    scales = {
        name.removesuffix(".weight"): torch.tensor(0.5 + i, dtype=torch.bfloat16)
        for i, name in enumerate(modules)
    }
    state = {name: t.to(FP8) if name in modules else t for name, t in tencent.items()}
    meant = dict(state)
    for name in modules:
        value = state[name].float() * scales[name.removesuffix(".weight")]
        meant[name] = value.to(torch.bfloat16)
    file = tmp_path / "model_fp8.pt"
    torch.save({"module": state}, file)
    with pytest.raises(ConversionError, match=r"scales are in model_fp8_map\.pt; put that file"):
        plan_of(file, **AXES)
    torch.save(scales, tmp_path / "model_fp8_map.pt")
    expected = leaves_of(write(meant, tmp_path / "meant" / "x.safetensors"), **AXES)
    assert_same(leaves_of(file, **AXES), expected)
    torch.save({"other": torch.tensor(1.0)} | dict(list(scales.items())[1:]), file.with_name(
        "model_fp8_map.pt"
    ))  # fmt: skip
    with pytest.raises(ConversionError, match="1 have no scale"):
        plan_of(file, **AXES)


# Repackaged encoders


def repackaged(role: str) -> dict[str, Entry]:
    """Names, shapes and types of ComfyUI's single file of an encoder, one layer deep."""
    model, sizes = RELEASED[role]
    if role == "text_encoder":
        model = transformers.LlamaForCausalLM
    config = model.config_class(**sizes, intermediate_size=6)
    with torch.device("meta"):
        state = model(config).state_dict()
    if role == "text_encoder":
        return float8_scaled(state) | {
            "vision_model.embeddings.class_embedding": entry((8,)),
            "multi_modal_projector.linear_1.weight": entry((8, 8)),
        }
    part = "text_model." if role == "text_encoder_2" else "vision_model."
    entries = {part + k.removeprefix(part): entry(tuple(v.shape)) for k, v in state.items()}
    more = {"logit_scale": (), f"{part}embeddings.position_ids": (1, 8)}
    if role == "text_encoder_2":
        more["text_projection.weight"] = (8, 8)
    return entries | {name: entry(shape) for name, shape in more.items()}


def entry(shape: tuple[int, ...], dtype: str = "float16") -> Entry:
    return Entry(shape, dtype, None)


def float8_scaled(state: State) -> dict[str, Entry]:
    entries = {"scaled_fp8": entry((2,), "float8_e4m3fn")}
    for name, tensor in state.items():
        packed = name.endswith("_proj.weight")
        entries[name] = entry(tuple(tensor.shape), "float8_e4m3fn" if packed else "float16")
        if packed:
            entries[name.removesuffix("weight") + "scale_weight"] = entry((), "float32")
    return entries


@pytest.mark.parametrize("role", RELEASED)
def test_repackaged_encoders_fit_without_a_config(role: str, tmp_path) -> None:
    path = tmp_path / "encoder.safetensors"
    entries, _ = float8.unpack(path, [], repackaged(role))
    plan = engine.plan(tables.recognise(weight_files.Checkpoint(path, [], entries), role))
    assert plan.cfg.layers == 1 and plan.cfg.width == RELEASED[role][1]["hidden_size"]


def test_a_scaled_llama_is_multiplied(tmp_path) -> None:
    config = transformers.LlamaConfig(**LLAMA)
    model = randomize(transformers.LlamaForCausalLM(config), 4)
    state = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    stored, meant = {"scaled_fp8": torch.zeros(0, dtype=FP8)}, {}
    for name, tensor in state.items():
        stored[name] = meant[name] = tensor
        if name.endswith("_proj.weight"):
            stored[name] = tensor.to(FP8)
            stored[name.removesuffix("weight") + "scale_weight"] = torch.tensor(0.7)
            meant[name] = (stored[name].float() * 0.7).to(torch.bfloat16)
    found = {}
    for name, tensors in {"stored": stored, "meant": meant}.items():
        config.save_pretrained(tmp_path / name)
        path = write(tensors, tmp_path / name / "llava_llama3.safetensors")
        found[name] = leaves_of(path, "text_encoder")
    assert_same(found["stored"], found["meant"])


# Inspection


def test_inspect_a_network(framepack, tmp_path) -> None:
    file = write(packed(framepack), tmp_path / "x.safetensors", "model.diffusion_model.")
    said = inspect.describe(file)
    count = sum(tensor.numel() for tensor in framepack.values())
    for part in (
        str(file), "float8_e4m3fn, 0 of them scaled, read as bfloat16", f"{count / 1e6:,.1f} M: ",
        "FramePack transformer in diffusers' naming", "model.diffusion_model.",
        "RoPE axes 16,56,56 do not add up",
    ):  # fmt: skip
        assert part in said
    write({"a.b": torch.zeros(3)}, tmp_path / "other.safetensors")
    said = inspect.describe(tmp_path / "other.safetensors")
    assert "unknown; its tensors begin with a.b" in said and "3 fp32" in said


@pytest.mark.golden
def test_inspect_a_pipeline_a_bundle_and_tencents_file(golden, tmp_path) -> None:
    pipeline = golden / "diffusers_pipeline" / "pipeline"
    said = inspect.describe(pipeline)
    assert "pipeline HunyuanVideoFramepackPipeline" in said and "SigLIP vision model" in said
    flags = BundleRequest(
        output=str(tmp_path / "out"), transformer=pipeline / "transformer", dtype="bfloat16"
    )
    manifest = make_bundle(flags)
    said = inspect.describe(tmp_path / "out")
    assert f"schedule     {manifest.schedule}, order inverted" in said
    assert "hunyuan_packed_dit, 0.3 M, bf16" in said
    said = inspect.describe(golden / "hunyuan_original" / "pytorch_model.pt")
    assert "HunyuanVideo VAE" in said and "all; convert with --vae" in said


@pytest.mark.parametrize(
    ("keys", "naming", "said"),
    [
        (("lora_down", "lora_up"), "lora_unet_single_blocks_{}_linear1", "kohya's keys"),
        (("lora_A", "lora_B"), "transformer.transformer_blocks.{}.attn.to_q", "PEFT's keys"),
    ],
)
def test_inspect_a_lora(keys, naming: str, said: str, tmp_path) -> None:
    state = {}
    for layer, rank in enumerate((4, 4, 8)):
        module = naming.format(layer)
        state[f"{module}.{keys[0]}.weight"] = torch.zeros(rank, 32)
        state[f"{module}.{keys[1]}.weight"] = torch.zeros(32, rank)
        if keys[0] == "lora_down":
            state[f"{module}.alpha"] = torch.tensor(2.0)
    told = inspect.describe(write(state, tmp_path / "lora.safetensors"))
    assert said in told and "4 (2 modules), 8 (1 modules)" in told
    assert ("alpha" in told) == (keys[0] == "lora_down")
    assert ("Tencent's" if "single_blocks" in naming else "diffusers'") in told
