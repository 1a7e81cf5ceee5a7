"""Wan's VAE in the names of diffusers and of the original release."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from framepack_jax import __main__ as cli
from framepack_jax import bundle
from framepack_jax.cli.convert import main
from framepack_jax.conversion import tables
from framepack_jax.conversion.weight_files import ConversionError, Entry
from framepack_jax.models.wan.vae_config import RELEASED_MEAN, RELEASED_STD, WanVaeConfig
from tests.fixtures.checkpoints import (
    abstract_checkpoint,
    assert_every_number_moved_once,
    assert_same,
    plan_of,
    state_of,
    write_folder,
)
from tests.fixtures.wan import SMALL, original_names, torch_vae


def test_diffusers_folder(tmp_path) -> None:
    model = torch_vae(SMALL)
    plan = plan_of(write_folder(model, tmp_path / "vae"), "vae")
    assert plan.cfg == SMALL
    leaves, tensors = dict(plan.leaves()), state_of(model)
    assert_every_number_moved_once(leaves, tensors)
    theirs = tensors["encoder.down_blocks.2.conv1.weight"]
    ours = leaves["encoder/down_1/resnet_0/conv1/kernel"]
    np.testing.assert_array_equal(ours[2, 0, 1], theirs[:, :, 2, 0, 1].T)
    theirs = tensors["decoder.up_blocks.0.upsamplers.0.resample.1.weight"]
    ours = leaves["decoder/up_0/space/kernel"]
    np.testing.assert_array_equal(ours[0, 2, 1], theirs[:, :, 2, 1].T)
    theirs = tensors["decoder.mid_block.attentions.0.to_qkv.weight"]
    ours = leaves["decoder/mid/attention/qkv/kernel"]
    np.testing.assert_array_equal(ours[:, 1, 0], theirs[8:16, :, 0, 0].T)


@pytest.mark.parametrize("file", ["Wan2.1_VAE.pth", "wan_2.1_vae.safetensors"])
def test_original_names_give_the_same_parameters(file, tmp_path) -> None:
    """Beside them lies the transformer's config.json, as in the release."""
    cfg = WanVaeConfig(width=2, layers_per_block=2)
    model = torch_vae(cfg)
    expected = dict(plan_of(write_folder(model, tmp_path / "vae"), "vae").leaves())
    state = original_names(model.state_dict(), cfg)
    assert len(state) == len(model.state_dict())
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 1536}))
    if file.endswith(".pth"):
        torch.save(state, folder / file)
    else:
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / file)
    plan = plan_of(folder / file, "vae")
    assert plan.cfg == cfg
    assert_same(dict(plan.leaves()), expected)


def test_released_sizes_are_known_without_a_config(tmp_path) -> None:
    with torch.device("meta"):
        state = AutoencoderKLWan().state_dict()
    for names in (state, original_names(state, WanVaeConfig())):
        checkpoint = abstract_checkpoint(names, tmp_path)
        source = tables.recognise(checkpoint, "vae")
        assert source.table.config(source) == WanVaeConfig()


def test_bundle_has_the_statistics_of_the_channels(tmp_path) -> None:
    """Those of config.json; without one, those of the release."""
    cfg = WanVaeConfig(width=2, layers_per_block=1)
    model = torch_vae(cfg)
    write_folder(model, tmp_path / "vae")
    save_file(original_names(model.state_dict(), cfg), tmp_path / "original.safetensors")
    expected = {
        "vae": (model.config.latents_mean, model.config.latents_std),
        "original.safetensors": (RELEASED_MEAN, RELEASED_STD),
    }
    for source, (mean, std) in expected.items():
        output = tmp_path / f"bundle of {source}"
        main(["--vae", str(tmp_path / source), "--output", str(output)])
        manifest = bundle.read_manifest(output)
        assert manifest.roles["vae"].kind == "wan_vae"
        assert (manifest.latent_mean, manifest.latent_std) == (tuple(mean), tuple(std))


def test_export_in_the_original_names_is_the_original(tmp_path) -> None:
    state = original_names(torch_vae(SMALL).state_dict(), SMALL)
    write_folder(torch_vae(SMALL), tmp_path / "vae")
    main(["--vae", str(tmp_path / "vae"), "--output", str(tmp_path / "bundle")])
    file = tmp_path / "out.safetensors"
    args = ["export", str(file), "--bundle", str(tmp_path / "bundle"), "--role", "vae"]
    cli.main([*args, "--key-format", "original"])
    found = load_file(file)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def wan22(folder: Path) -> Path:
    model = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=6, num_res_blocks=1, in_channels=12, out_channels=12,
        is_residual=True, patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 6,
        latents_std=[1.0] * 6,
    )  # fmt: skip
    return write_folder(model, folder)


def test_vae_of_wan22_is_refused_by_name(tmp_path) -> None:
    folder = wan22(tmp_path / "vae")
    for remove in (False, True):
        if remove:
            (folder / "config.json").unlink()
        with pytest.raises(ConversionError, match=r"is the VAE of Wan 2\.2 \(6 latent channels"):
            plan_of(folder, "vae")
    names = {
        "encoder.middle.1.to_qkv.weight": (8, 8, 1, 1), "conv2.bias": (48,),
        "encoder.downsamples.0.downsamples.0.residual.2.weight": (8, 8, 3, 3, 3),
    }  # fmt: skip
    checkpoint = abstract_checkpoint({}, tmp_path)
    checkpoint._entries |= {name: Entry(shape, "bfloat16", None) for name, shape in names.items()}
    source = tables.recognise(checkpoint, "vae")
    with pytest.raises(ConversionError, match=r"is the VAE of Wan 2\.2 \(48 latent channels"):
        source.table.config(source)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("attn_scales", [0.5], "attn_scales"),
        ("patch_size", 2, "patch_size"),
        ("decoder_base_dim", 8, "decoder_base_dim"),
        ("temperal_downsample", [True], "halves_time has 1 entries; 3 multipliers need 2"),
        ("dim_mult", "x", "multipliers"),
        ("latents_mean", [0.0], "latents_mean"),
        ("latents_std", [0.0] * 6, "latents_std"),
    ],
)
def test_strange_configs_are_refused_by_name(field, value, says, tmp_path) -> None:
    folder = write_folder(torch_vae(SMALL), tmp_path / "vae")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(SystemExit, match=says):
        main(["--vae", str(folder), "--output", str(tmp_path / "bundle")])


def test_missing_block_is_named(tmp_path) -> None:
    state = torch_vae(SMALL).state_dict()
    del state["decoder.up_blocks.1.resnets.0.conv2.weight"]
    folder = write_folder(torch_vae(SMALL), tmp_path / "vae")
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConversionError, match=r"up_blocks\.1\.resnets\.0\.conv2\.weight"):
        plan_of(folder, "vae")
