"""LoRA files written again in other names."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file

from framepack_jax import __main__ as cli
from framepack_jax import bundle
from framepack_jax.conversion import lora

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch


def test_a_lora_goes_out_in_other_names(framepack_bundle, tmp_path, capsys) -> None:
    manifest = bundle.read_manifest(framepack_bundle)
    _, cfg = bundle.role_config(manifest, "transformer")
    random = np.random.default_rng(0)
    module = "transformer.transformer_blocks.0.attn.to_out.0"
    down, up = (random.standard_normal(s).astype(np.float32) for s in ((3, 32), (32, 3)))
    factors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    save_file(factors, tmp_path / "in.safetensors")
    args = ["--bundle", framepack_bundle, "--lora", str(tmp_path / "in.safetensors")]
    target = tmp_path / "out.safetensors"
    cli.main(["export", str(target), *args, "--key-format", "kohya"])
    assert "1 of 1 modules apply" in capsys.readouterr().out
    flat = "lora_unet_transformer_blocks_0_attn_to_out_0"
    made = load_file(target)
    assert made.keys() == {f"{flat}.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")}
    np.testing.assert_array_equal(made[f"{flat}.lora_up.weight"], up)
    theirs, ours = (lora.read(tmp_path / f"{n}.safetensors", cfg).lora for n in ("in", "out"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(SystemExit, match="exists already"):
        cli.main(["export", str(target), *args, "--key-format", "kohya"])
    with pytest.raises(SystemExit, match="expected one of diffusers, original, kohya"):
        cli.main(["export", str(tmp_path / "x.safetensors"), *args, "--key-format", "tencent"])


def test_without_a_bundle_names_tell_the_family(tmp_path, capsys) -> None:
    """The released model of 14B, with Helios' embeddings."""
    module, width = "diffusion_model.blocks.39.cross_attn.v", 5120
    factors = {
        f"{module}.lora_A.weight": np.ones((2, width), np.float32),
        f"{module}.lora_B.weight": np.ones((width, 2), np.float32),
        "diffusion_model.patch_mid.lora_A.weight": np.ones((2, 16, 2, 4, 4), np.float32),
        "diffusion_model.patch_mid.lora_B.weight": np.ones((width, 2, 1, 1, 1), np.float32),
    }
    save_file(factors, tmp_path / "in.safetensors")
    args = ["--lora", str(tmp_path / "in.safetensors"), "--key-format"]
    cli.main(["export", str(tmp_path / "out.safetensors"), *args, "kohya"])
    assert "2 of 2 modules apply" in capsys.readouterr().out
    made = load_file(tmp_path / "out.safetensors")
    assert made["lora_unet_blocks_39_cross_attn_v.lora_up.weight"].shape == (width, 2)
    assert made["lora_unet_patch_mid.lora_down.weight"].shape == (2, 16, 2, 4, 4)
    with pytest.raises(SystemExit, match=r"expected one of diffusers, original, kohya, comfyui$"):
        cli.main(["export", str(tmp_path / "x.safetensors"), *args, "kohya-tencent"])
