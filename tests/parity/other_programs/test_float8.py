"""Weights in 8-bit floats with and without scales, and repackaged encoders."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from framepack_jax.conversion import engine, float8, tables, weight_files
from framepack_jax.conversion.weight_files import ConversionError
from tests.fixtures.checkpoints import (
    AXES,
    FP8,
    LLAMA,
    RELEASED,
    assert_same,
    leaves_of,
    packed,
    plan_of,
    repackaged,
    scaled,
    write,
)
from tests.fixtures.comfyui import State
from tests.fixtures.torch_reference import randomize


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


@pytest.mark.parametrize("role", RELEASED)
def test_repackaged_encoders_fit_without_a_config(role: str, tmp_path) -> None:
    path = tmp_path / "encoder.safetensors"
    entries, _ = float8.unpack(path, [], repackaged(role))
    plan = engine.make_job(tables.recognise(weight_files.Checkpoint(path, [], entries), role))
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
