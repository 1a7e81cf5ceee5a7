"""LoRA files that are refused, and what the message says."""

import collections
import itertools
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from framepack_jax.conversion import lora as files
from framepack_jax.conversion import lora_peft, weight_files
from framepack_jax.conversion.weight_files import ConversionError
from tests.fixtures.lora import behind

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch


def test_two_adapters_behind_prefixes(peft, model, tmp_path) -> None:
    tensors = load_file(peft[0])
    save_file(behind("net.")(tensors) | behind("ema.")(tensors), tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=r"'ema\.' and .* 'net\.'.*behind one prefix"):
        files.read(tmp_path / "x.safetensors", model[0])


def test_a_network_with_some_names_alike(model, tmp_path) -> None:
    """Stable Diffusion's blocks end in names of FramePack's."""
    block = ["proj_in", "proj_out", "transformer_blocks.0.ff.net.0.proj"]
    block += [f"transformer_blocks.0.attn{i}.to_{x}" for i in (1, 2) for x in "qkv"]
    names = [
        f"unet.down_blocks.{i}.attentions.0.{module}.lora_{side}.weight"
        for i, module, side in itertools.product(range(2), block, "AB")
    ]
    save_file({name: np.ones((2, 2), np.float32) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="none of its 18 modules is one of this network"):
        files.read(tmp_path / "x.safetensors", model[0])


def test_names_of_another_network(model, tmp_path) -> None:
    modules = [f"lora_unet_down_blocks_{i}_attn" for i in range(9)]
    names = [f"{module}.lora_{side}.weight" for module in modules for side in ("up", "down")]
    save_file({name: np.ones((2, 2), np.float32) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="none of its 9 modules") as error:
        files.read(tmp_path / "x.safetensors", model[0])
    said = str(error.value)
    assert "lora_unet_down_blocks_0_attn" in said and "and 5 more" in said
    assert "transformer_blocks.0.attn.to_q" in said and "double_blocks.0.img_attn_qkv" in said


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("lora_unet_double_blocks_0_img_mod_linear.dora_scale", "DoRA"),
        ("transformer_blocks.0.attn.to_q.lora_magnitude_vector", "DoRA"),
        ("lora_unet_x.hada_t1", "Tucker"), ("lora_unet_x.lokr_t2", "Tucker"),
        ("lora_unet_x.oft_blocks", "OFT"), ("lora_unet_x.lora_mid.weight", "LoCon"),
        ("proj_out.lora_B.bias", "biases"), ("diffusion_model.proj_out.diff", "differences"),
    ],
)  # fmt: skip
def test_other_kinds_of_adapter(tensor: str, kind: str, peft, model, tmp_path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(load_file(peft[0]) | {tensor: np.ones(1, np.float32)}, file)
    with pytest.raises(ConversionError, match=f"{kind}.*not supported") as error:
        files.read(file, model[0])
    assert tensor in str(error.value)
    assert files.is_lora(weight_files.open_checkpoint(file))


def test_what_is_wrong_is_named_together(peft, model, tmp_path) -> None:
    tensors = load_file(peft[0])
    block = "transformer_blocks.0.attn"
    del tensors[f"{block}.to_q.lora_A.weight"]
    tensors[f"{block}.to_k.lora_B.weight"] = np.ones((17, 4), np.float32)
    tensors[f"{block}.to_v.lora_A.weight"][1, 1] = np.nan
    tensors["norm_out.linear.alpha"] = np.ones(2, np.float32)
    large = "time_text_embed.timestep_embedder.linear_1"
    tensors[f"{large}.alpha"] = np.array(1e300)
    for side in ("A", "B"):
        again = f"proj_out.lora_{side}.weight"
        tensors[f"transformer.{again}"] = tensors[again]
    tensors[f"{block}.to_out.0.lora_A.weight"] = np.ones((0, 16), np.float32)
    tensors[f"{block}.to_out.0.lora_B.weight"] = np.ones((16, 0), np.float32)
    tensors["x_embedder.proj.lora_B.weight"] = np.ones((16, 4), np.int32)
    expected = [
        "to_q: it has .* but no down", r"to_k: its factors are \(4, 16\) and \(17, 4\), expected",
        "to_v.* NaN", r"alpha has shape \(2,\)", r"linear_1: alpha is 1e\+300, expected less",
        "proj_out occurs twice",
        r"to_out.0: .*\(0, 16\)", "expected float32, bfloat16",
    ]  # fmt: skip
    said = []
    for keep in (block, "norm_out", "proj_out", "x_embedder", large):
        save_file({n: x for n, x in tensors.items() if keep in n}, tmp_path / "x.safetensors")
        with pytest.raises(ConversionError, match="does not fit the network") as error:
            files.read(tmp_path / "x.safetensors", model[0])
        said.append(str(error.value))
    for pattern in expected:
        assert any(re.search(pattern, text) for text in said), pattern


def test_one_adapter_a_file(model, tmp_path) -> None:
    names = ["proj_out.lora_A.one.weight", "proj_out.lora_A.two.weight"]
    save_file({name: np.ones((2, 16), np.float32) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="a single adapter"):
        files.read(tmp_path / "x.safetensors", model[0])


def test_no_lora_at_all(module, model, tmp_path) -> None:
    module.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="is not a LoRA") as error:
        files.read(tmp_path, model[0])
    assert "lora_down" in str(error.value)
    assert not files.is_lora(weight_files.open_checkpoint(tmp_path))
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ConversionError, match=r"cut\.safetensors"):
        files.read(tmp_path / "cut.safetensors", model[0])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "use_dora = True"), ({"bias": "all"}, "bias = 'all'"),
        ({"peft_type": "OFT"}, "OFT"), ({"init_lora_weights": "pissa_niter_4"}, "base weights"),
        ({"lora_alpha": "8"}, "for an alpha"), ({"lora_alpha": 10**400}, "for an alpha"),
        ({"alpha_pattern": [3]}, "for an alpha"), ({"alpha_pattern": {"x": None}}, "for an alpha"),
        ({"alpha_pattern": {"(a+)+": 3}}, "regular expression"),
    ],
)  # fmt: skip
def test_settings_that_mean_more(fields: dict, said: str, peft, model, tmp_path) -> None:
    metadata = {lora_peft.METADATA: json.dumps({f"transformer.{k}": v for k, v in fields.items()})}
    save_file(load_file(peft[0]), tmp_path / "x.safetensors", metadata)
    with pytest.raises(ConversionError, match=said):
        files.read(tmp_path / "x.safetensors", model[0])


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_damaged_settings(text: str, peft, model, tmp_path) -> None:
    save_file(load_file(peft[0]), tmp_path / "x.safetensors", {lora_peft.METADATA: text})
    with pytest.raises(ConversionError, match=r"is not (valid JSON|a JSON object)"):
        files.read(tmp_path / "x.safetensors", model[0])


def test_mutated_files_are_read_or_refused(peft, model, tmp_path) -> None:
    """Nothing but ConversionError, whatever bits of names, shapes, settings or numbers change."""
    tensors = {n: x for n, x in load_file(peft[0]).items() if ".attn.to_" in n and "1" in n}
    tensors["transformer_blocks.1.attn.to_q.alpha"] = np.float32([3])
    settings = {"lora_alpha": 4, "alpha_pattern": {"^proj_out": 2}}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, {lora_peft.METADATA: json.dumps(settings)})
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    random, outcomes = np.random.default_rng(3), collections.Counter()
    for _ in range(300):
        mutated = bytearray(whole)
        for position in random.integers(0, random.choice([8, header, len(whole)]), 3):
            mutated[position] = random.choice(list(b'"0[]{}:,.Aaf_\x00\xff'))
        file.write_bytes(mutated[: random.choice([len(whole)] * 4 + [header // 2])])
        try:
            read = files.read(file, model[0])
            outcomes["read"] += 1
            assert all(np.isfinite(x).all() for f in read.lora.values() for x in f)
        except ConversionError:
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 10, outcomes
