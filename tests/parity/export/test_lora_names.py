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
