"""Names of ComfyUI and Tencent, and prefixes of wrappers."""

import json
import re

import numpy as np
import pytest
from diffusers import AutoencoderKLHunyuanVideo

from framepack_jax.cli.convert import main
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError
from tests.fixtures.checkpoints import AXES, assert_same, leaves_of, plan_of, scaled, write
from tests.fixtures.comfyui import comfyui, comfyui_vae
from tests.fixtures.torch_reference import randomize

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch


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
