"""Exported files and folders: diffusers and transformers load the same bits."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from framepack_jax import __main__ as cli
from framepack_jax import bundle
from framepack_jax.conversion import export
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from tests.fixtures.exported import MODULES, bundle_of, module_of, same_bits
from tests.fixtures.wan_networks import draw, original_names, torch_velocity


@pytest.mark.parametrize("name", MODULES)
def test_the_libraries_load_a_folder(name: str, tmp_path, monkeypatch) -> None:
    module = module_of(name)
    root = bundle_of(module, name, tmp_path)
    target = tmp_path / "deep" / "out"
    role = MODULES[name][0]
    shard = bundle.stored_bytes(root, bundle.read_manifest(root), role) // 4
    monkeypatch.setattr(export, "SHARD", shard)
    cli.main(["export", str(target), "--bundle", root, "--role", role])
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 2
    for tensors in map(load_file, shards):
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= shard
    # diffusers and transformers name the flag differently.
    flag = "dtype" if isinstance(module, transformers.PreTrainedModel) else "torch_dtype"
    loaded, info = type(module).from_pretrained(
        target, output_loading_info=True, **{flag: torch.bfloat16}
    )
    assert not any(info.values()), info
    # diffusers keeps some modules of Wan in float32.
    assert same_bits(loaded.to(torch.bfloat16).state_dict(), module.state_dict())
    assert config_of(loaded) == config_of(module)


def config_of(module: torch.nn.Module) -> dict[str, Any]:
    """Without notes about where it was loaded from, and by which version."""
    config = module.config
    fields = config if isinstance(config, dict) else config.to_dict()
    notes = ("_name_or_path", "_diffusers_version", "transformers_version", "dtype",
             "_use_default_values")  # fmt: skip
    return json.loads(json.dumps({k: v for k, v in fields.items() if k not in notes}))


def test_the_loaded_model_gives_the_same_output(tmp_path) -> None:
    module = module_of("framepack", torch.float32)
    root = bundle_of(module, "framepack", tmp_path)
    cli.main(["export", str(tmp_path / "out"), "--bundle", root])
    loaded = type(module).from_pretrained(tmp_path / "out").eval()
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    inputs = {
        "hidden_states": normal(1, 16, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": normal(1, 3, 20),
        "encoder_attention_mask": torch.ones(1, 3, dtype=torch.long),
        "pooled_projections": normal(1, 12),
        "image_embeds": normal(1, 4, 10),
        "indices_latents": torch.tensor([9, 10]),
        "guidance": torch.tensor([6000.0]),
        "latents_clean": normal(1, 16, 1, 4, 4),
        "indices_latents_clean": torch.tensor([0]),
        "latents_history_2x": normal(1, 16, 2, 4, 4),
        "indices_latents_history_2x": torch.tensor([1, 2]),
        "latents_history_4x": normal(1, 16, 4, 4, 4),
        "indices_latents_history_4x": torch.tensor([3, 4, 5, 6]),
    }
    with torch.no_grad():
        theirs, ours = (m(**inputs, return_dict=False)[0] for m in (module, loaded))
    assert theirs.std() > 0.1
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["helios", "wan"])
def test_the_loaded_network_of_wan_gives_the_same_output(name: str, tmp_path) -> None:
    module = module_of(name, torch.float32)
    root = bundle_of(module, name, tmp_path)
    cli.main(["export", str(tmp_path / "out"), "--bundle", root])
    loaded = type(module).from_pretrained(tmp_path / "out").eval()
    tensors = draw(4, 6, 20)
    theirs = torch_velocity(module, tensors)
    np.testing.assert_array_equal(torch_velocity(loaded, tensors), theirs)
    assert theirs.std() > 0.1


@pytest.mark.parametrize(
    ("name", "flags", "names"),
    [
        ("wan", [], original_names), ("wan", ["--key-format", "comfyui"], original_names),
        ("wan", ["--key-format", "diffusers"], dict), ("helios", [], dict),
        ("helios", ["--key-format", "original"], original_names),
    ],
)  # fmt: skip
def test_files_of_wan_have_names_of_the_release(name, flags, names, tmp_path) -> None:
    """Those of Helios, which the release does not have, are diffusers'."""
    module = module_of(name)
    root = bundle_of(module, name, tmp_path)
    cli.main(["export", str(tmp_path / "x.safetensors"), "--bundle", root, *flags])
    assert same_bits(load_file(tmp_path / "x.safetensors"), names(module.state_dict()))


@pytest.mark.golden
def test_the_original_file_comes_back(golden, tmp_path) -> None:
    """Tencent's own file -> bundle -> one safetensors file: the same tensors, the final modulation
    with its halves in the original order."""
    file = golden / "hunyuan_original" / "mp_rank_00_model_states.pt"
    root = str(tmp_path / "bundle")
    make_bundle(BundleRequest(output=root, transformer=file, rope_axes="4,6,6"))
    target = tmp_path / "out.safetensors"
    cli.main(["export", str(target), "--bundle", root])
    theirs = torch.load(file, weights_only=True)["module"]
    assert same_bits(load_file(target), dict(theirs))


def test_types_can_be_changed_on_the_way_out(tmp_path) -> None:
    module = module_of("base")
    root = bundle_of(module, "base", tmp_path)
    target = tmp_path / "wide.safetensors"
    cli.main(
        ["export", str(target), "--bundle", root, "--dtype", "float32", "--key-format", "diffusers"]
    )
    wide = {name: tensor.float() for name, tensor in module.state_dict().items()}
    assert same_bits(load_file(target), wide)


def test_a_vae_file_has_bare_names(tmp_path) -> None:
    """As the VAE loaders of ComfyUI and Tencent look for them."""
    module = module_of("vae")
    root = bundle_of(module, "vae", tmp_path)
    cli.main(["export", str(tmp_path / "vae.safetensors"), "--bundle", root, "--role", "vae"])
    assert same_bits(load_file(tmp_path / "vae.safetensors"), module.state_dict())
