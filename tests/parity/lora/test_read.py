"""LoRA files in the names of every program."""

import copy
import itertools
import re

import numpy as np
import pytest
from peft import get_peft_model
from safetensors.numpy import load_file, save_file

from framepack_jax.conversion import lora as files
from framepack_jax.models import lora
from tests.fixtures.checkpoints import AXES, plan_of
from tests.fixtures.lora import (
    Original,
    Tensors,
    assert_same_lora,
    behind,
    changes,
    config_of,
    kohya,
    pipeline_keys,
    randomize_adapters,
)
from tests.fixtures.torch_reference import relative_error

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch


def dotted(original: Original) -> Tensors:
    """As diffusion-pipe writes them; alpha is multiplied in."""
    tensors = {}
    for module, (down, up, alpha) in original.adapters.items():
        scaled = up * np.float32(alpha / len(down))
        tensors[f"diffusion_model.{module}.lora_A.weight"] = down
        tensors[f"diffusion_model.{module}.lora_B.weight"] = scaled
    return tensors


def bare_with_alpha(original: Original) -> Tensors:
    tensors = {}
    for module, (down, up, alpha) in original.adapters.items():
        tensors[f"{module}.lora.down.weight"], tensors[f"{module}.lora.up.weight"] = down, up
        tensors[f"{module}.alpha"] = np.array([alpha], np.float32)
    return tensors


def comfyui(original: Original) -> Tensors:
    """As ComfyUI saves them: by the names of its own modules."""
    renamed = {"img_attn_qkv": "img_attn.qkv", "_mod.linear": "_mod.lin"}
    renamed |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "modulation.linear": "modulation.lin"}
    tensors = {}
    for name, tensor in dotted(original).items():
        if "double_blocks." in name or "single_blocks." in name:
            for theirs, ours in renamed.items():
                name = name.replace(theirs, ours)
        tensors[name] = tensor
    assert "diffusion_model.double_blocks.1.img_mlp.0.lora_A.weight" in tensors
    return tensors


@pytest.mark.golden
@pytest.mark.parametrize("spell", [kohya, dotted, bare_with_alpha, comfyui])
def test_tencent_names_change_what_they_say(spell, original, tmp_path) -> None:
    """Merging in Tencent's layout and converting is converting and merging here."""
    save_file(spell(original), tmp_path / "x.safetensors")
    read = files.read(tmp_path / "x.safetensors", original.cfg)
    assert read.applied == read.modules == len(original.adapters)
    assert "Tencent" in read.summary()
    adapted = {name: tensor.copy() for name, tensor in original.tensors.items()}
    for module, (down, up, alpha) in original.adapters.items():
        flat = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        change = (alpha / len(down) * flat).reshape(adapted[f"{module}.weight"].shape)
        adapted[f"{module}.weight"] += change
    save_file(adapted, tmp_path / "adapted.safetensors")
    theirs = dict(plan_of(tmp_path / "adapted.safetensors", **AXES).leaves())
    ours = changes(read.lora)
    for path, leaf in theirs.items():
        change = leaf - original.leaves[path]
        assert path.endswith("/kernel") == (path in ours) == bool(change.any()), path
        if path in ours:
            assert relative_error(ours[path], change) < 1e-5, path


def peft_keys(tensors: Tensors) -> Tensors:
    return {f"base_model.model.{name}": x for name, x in tensors.items()}


def default_adapter(tensors: Tensors) -> Tensors:
    return {re.sub(r"(lora_[AB])", r"\1.default", name): x for name, x in tensors.items()}


def musubi(tensors: Tensors) -> Tensors:
    """FramePack's LoRAs: diffusers' names by kohya's rule."""
    sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
    spelt = {}
    for name, x in tensors.items():
        module, side, _ = name.rsplit(".", 2)
        spelt[f"lora_unet_{module.replace('.', '_')}.{sides[side]}.weight"] = x
    return spelt


def onetrainer(tensors: Tensors) -> Tensors:
    """Its older files; as musubi's, of the diffusers pipeline's part."""
    return {
        name.replace("lora_unet_", "lora_transformer_"): x for name, x in musubi(tensors).items()
    }


def dots_for_underscores(tensors: Tensors) -> Tensors:
    """As musubi-tuner's converter spells FramePack's modules."""
    return {
        f"diffusion_model.{module.replace('_', '.')}.{factor}": x
        for name, x in tensors.items()
        for module, factor in [re.fullmatch(r"(.*)\.(lora_\w\.weight)", name).groups()]
    }


def half_of_the_dots(tensors: Tensors) -> Tensors:
    """As the wrapper of FramePack for ComfyUI mends such names."""
    return {
        name.replace("single.transformer.blocks", "single_transformer_blocks").replace(
            "to.out", "to_out"
        ): x
        for name, x in dots_for_underscores(tensors).items()
    }


def underscores_behind_prefixes(tensors: Tensors) -> Tensors:
    return {f"base_model.model.{name}": x for name, x in musubi(tensors).items()}


SPELLINGS = [
    pipeline_keys, peft_keys, default_adapter, musubi, onetrainer,
    dots_for_underscores, half_of_the_dots, underscores_behind_prefixes,
    *(behind(f"{prefix}.") for prefix in ("net", "ema", "student", "a.b_c")), behind("lora_dit_"),
    behind("ema.", pipeline_keys), behind("unet.", musubi), behind("net._orig_mod."),
]  # fmt: skip


@pytest.mark.parametrize("spell", SPELLINGS)
def test_the_same_under_every_prefix(spell, peft, model, tmp_path) -> None:
    file, _ = peft
    tensors = load_file(file)
    save_file(tensors, tmp_path / "bare.safetensors")
    save_file(spell(tensors), tmp_path / "spelt.safetensors")
    bare, spelt = (files.read(tmp_path / f"{n}.safetensors", model[0]) for n in ("bare", "spelt"))
    assert_same_lora(spelt.lora, bare.lora)
    # Without any alpha it is the rank.
    assert {s for f in bare.lora.values() for s in f.scale} == {1.0}


def test_the_folder_of_peft(module, model, inputs, tmp_path) -> None:
    """`save_pretrained`: alpha in adapter_config.json, here by rank-stabilised LoRA."""
    config = config_of(module, use_rslora=True)
    adapted = randomize_adapters(get_peft_model(copy.deepcopy(module), config))
    adapted.save_pretrained(tmp_path)
    read = files.read(tmp_path, model[0])
    assert_same_lora(files.read(tmp_path / "adapter_model.safetensors", model[0]).lora, read.lora)
    np.testing.assert_allclose(read.lora["embed/time_in/kernel"].scale, 6 / 2)
    # The layers of to_q have rank 3, those of to_k an alpha of 2.
    scale = read.lora["double/01/img_qkv/kernel"].scale
    np.testing.assert_allclose(scale, [6 / 3**0.5] * 3 + [2 / 2] * 4 + [6 / 2] * 4)
    weights = adapted.merge_and_unload().state_dict()
    merged = lora.merge(lora.attach(model[1], read.lora))
    for name, path in (
        ("transformer_blocks.1.ff.net.2.weight", ("double", "img_mlp_out")),
        ("single_transformer_blocks.1.proj_mlp.weight", ("single", "mlp_in")),
    ):
        ours = merged[path[0]][path[1]]["kernel"][1]
        assert relative_error(ours.T, weights[name].numpy()) < 1e-6
    ours = merged["embed"]["context_k2"]["kernel"][16 * 5 + 3]
    theirs = weights["clean_x_embedder.proj_2x.weight"][:, 3, 0, 1, 1].numpy()
    assert relative_error(ours, theirs) < 1e-6


def test_parts_of_a_file_and_what_is_not_of_the_network(peft, model, tmp_path) -> None:
    file, _ = peft
    tensors = load_file(file)
    some = {n: x for n, x in tensors.items() if n.startswith("transformer_blocks.0.attn.to_v.")}
    for side in ("lora_A", "lora_B"):
        some[f"text_encoder.layers.0.q_proj.{side}.weight"] = np.ones((2, 2), np.float32)
    save_file(some, tmp_path / "x.safetensors")
    read = files.read(tmp_path / "x.safetensors", model[0])
    assert (read.applied, read.modules) == (1, 2)
    assert read.unmatched == ("text_encoder.layers.0.q_proj",)
    assert "1 of 2 modules" in read.summary() and "text_encoder" in read.summary()
    ((path, (a, b, _)),) = read.lora.items()
    assert path == "double/00/img_qkv/kernel" and a.shape == (16, 4)
    assert b[:, 2].any() and not b[:, :2].any()
    assert "50% of the LoRA does not apply: 1 of its 2 modules" in read.warning()
    for i in range(5):
        tensors[f"text_encoder.{i}.lora_A.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, tmp_path / "most.safetensors")
    assert files.read(tmp_path / "most.safetensors", model[0]).warning() is None


def test_one_prefix_is_taken_off_a_file(peft, model, tmp_path) -> None:
    """Not that of a text encoder, although some of its modules end as those of the network do."""
    bare = load_file(peft[0])
    tensors = behind("dit.")(bare)
    encoder = ["llm.0.proj_out", "llm.0.q_proj", "llm.0.k_proj", "llm.1.proj_out", "llm.1.q_proj"]
    for module, side in itertools.product(encoder, "AB"):
        tensors[f"{module}.lora_{side}.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    read = files.read(tmp_path / "x.safetensors", model[0])
    save_file(bare, tmp_path / "bare.safetensors")
    assert_same_lora(read.lora, files.read(tmp_path / "bare.safetensors", model[0]).lora)
    assert sorted(read.unmatched) == sorted(encoder)
