"""Exports that are refused, and what the message says."""

import pytest

from framepack_jax import __main__ as cli
from framepack_jax import bundle
from framepack_jax.conversion import export, export_configs
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.wan.config import WanConfig

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "framepack export needs --bundle"),
        (["--bundle", "{absent}"], "is not a bundle"),
        (["--bundle", "{bundle}", "--role", "vae"], "has no vae"),
        (["--bundle", "{bundle}", "--dtype", "int8"], "int8"),
        (["--bundle", "{bundle}", "--key-format", "original"], "ends in .safetensors"),
        (["--bundle", "{bundle}", "--key-format", "theirs"], "expected one of diffusers, original"),
    ],
)
def test_export_errors_are_one_message(args, said, framepack_bundle, tmp_path) -> None:
    paths = {"bundle": framepack_bundle, "absent": tmp_path / "absent"}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(tmp_path / "out"), *(arg.format(**paths) for arg in args)])
    assert stopped.value.code.startswith("error: ") and said in stopped.value.code
    assert not (tmp_path / "out").exists()


def test_nothing_is_exported_to_an_object_store(framepack_bundle) -> None:
    with pytest.raises(SystemExit, match="gs://there/x: expected a path on a disk"):
        cli.main(["export", "gs://there/x", "--bundle", framepack_bundle])


def test_nothing_is_written_over(framepack_bundle, tmp_path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    (tmp_path / "there.safetensors").write_text("mine")
    for target in ("there", "there.safetensors"):
        with pytest.raises(SystemExit, match="exists"):
            cli.main(["export", str(tmp_path / target), "--bundle", framepack_bundle])
    assert (tmp_path / "there" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_llama_and_other_kernels_do_not_go_out(framepack_bundle, tmp_path) -> None:
    manifest = bundle.read_manifest(framepack_bundle)
    released = bundle.read_manifest(bundle.resolve("framepack_i2v"))
    with pytest.raises(ConversionError, match="make no whole model"):
        export._steps(released, "text_encoder", "diffusers")
    role = manifest.roles["transformer"]
    cfg = bundle.config_from_json(TransformerConfig, {**role.config, "context_kernels": ["k1"]})
    with pytest.raises(ConversionError, match="embeds context with k1; diffusers'"):
        export_configs.CONFIGS["hunyuan_packed_dit"](cfg, manifest)


def test_networks_of_wan_that_diffusers_does_not_have(framepack_bundle) -> None:
    manifest = bundle.read_manifest(framepack_bundle)
    configs = export_configs.CONFIGS["wan_packed_dit"]
    with pytest.raises(ConversionError, match="embeds context with k1, k2; diffusers'"):
        configs(WanConfig(context_kernels=("k1", "k2")), manifest)
    with pytest.raises(ConversionError, match=r"Wan model lacks .*clean_context=True"):
        configs(WanConfig(clean_context=True), manifest)
