"""`framepack inspect` of networks, pipelines, bundles and LoRA files."""

import pytest
import torch

from framepack_jax.conversion import inspect
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from tests.fixtures.checkpoints import packed, write


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
