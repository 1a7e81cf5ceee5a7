"""Checkpoints that are refused, and what the message says."""

import dataclasses
import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import (
    HunyuanVideoFramepackTransformer3DModel,
)
from safetensors.torch import save_file

from framepack_jax.conversion import engine, tables, weight_files
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError
from tests.fixtures.checkpoints import (
    CFG,
    CLIP,
    LLAMA,
    SIZES,
    abstract_checkpoint,
    plan_of,
    write_folder,
    write_sharded,
)


def test_names_are_gone_through_once(tmp_path, monkeypatch) -> None:
    """However many tensors are missing."""
    with torch.device("meta"):
        state = HunyuanVideoFramepackTransformer3DModel(
            **SIZES, has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True
        ).state_dict()
    names, calls = weight_files.Checkpoint.names, []
    monkeypatch.setattr(
        weight_files.Checkpoint, "names", lambda self: calls.append(1) or names(self)
    )
    counts = []
    for whole in (True, False):
        kept = {k: v for k, v in state.items() if whole or ".norm" not in k}
        source = tables.recognise(abstract_checkpoint(kept, tmp_path), "transformer")
        calls.clear()
        source = dataclasses.replace(source, overrides={"rope_axes": (4, 6, 6)})
        problems = engine._problems(source, CFG, engine.steps_of(source.table, CFG))
        assert whole != bool(problems)
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 2


@pytest.mark.parametrize("field", ["heads", "norm_groups"])
def test_sizes_that_make_no_network(field: str, autoencoder, framepack, tmp_path) -> None:
    model, role = (autoencoder, "vae") if field == "norm_groups" else (framepack, "transformer")
    source = tables.recognise(
        weight_files.open_checkpoint(write_folder(model, tmp_path / role)), role
    )
    cfg = dataclasses.replace(source.table.config(source), **{field: 0})
    source = dataclasses.replace(
        source, table=dataclasses.replace(source.table, config=lambda _: cfg)
    )
    with pytest.raises(ConversionError, match=rf"{role}: its sizes make no .*{field}=0"):
        engine.make_job(source)


def test_everything_wrong_is_told_at_once(framepack, tmp_path) -> None:
    write_folder(framepack, tmp_path / "model")
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    state = {
        k: v for k, v in framepack.state_dict().items() if "single_transformer_blocks.1" not in k
    }
    del state["proj_out.bias"]
    state["norm_out.linear.weight"] = torch.zeros(64, 31)
    state["transformer_blocks.0.extra.weight"] = torch.zeros(1)
    state["context_embedder.proj_in.bias"] = torch.zeros(32, dtype=torch.int8)
    save_file(state, file)
    with pytest.raises(ConversionError) as error:
        plan_of(tmp_path / "model")
    for part in (
        str(tmp_path / "model"),
        "layers absent (1): single_transformer_blocks.1\n",
        "tensors missing (1): proj_out.bias\n",
        "norm_out.linear.weight is (64, 31), expected (64, 32)",
        "context_embedder.proj_in.bias is I8",
        "no place for (1): transformer_blocks.0.extra.weight",
    ):
        assert part in str(error.value)


def test_layer_gaps_show_without_a_config(framepack, tmp_path) -> None:
    state = {k: v for k, v in framepack.state_dict().items() if "transformer_blocks.0" not in k}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=r"absent \(2\): transformer_blocks\.0, single_"):
        plan_of(tmp_path / "x.safetensors", rope_axes=(4, 6, 6))


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_condition_type", "token_replace"), ("qk_norm", "layer_norm"), ("patch_size", 4)],
)
def test_unsupported_transformers_are_refused_by_name(field, value, framepack, tmp_path) -> None:
    write_folder(framepack, tmp_path / "model")
    edit_config(tmp_path / "model", {field: value})
    with pytest.raises(ConversionError, match=f"{field} = {value!r}"):
        plan_of(tmp_path / "model")


def test_unsupported_encoders_are_refused_by_name(autoencoder, tmp_path) -> None:
    write_folder(autoencoder, tmp_path / "vae")
    edit_config(tmp_path / "vae", {"act_fn": "gelu"})
    with pytest.raises(ConversionError, match="act_fn = 'gelu'"):
        plan_of(tmp_path / "vae", "vae")
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    config = transformers.LlamaConfig(**LLAMA, rope_parameters=scaled)
    write_folder(transformers.LlamaModel(config), tmp_path / "llama")
    with pytest.raises(ConversionError, match="rope_type = 'llama3'"):
        plan_of(tmp_path / "llama", "text_encoder")
    config = transformers.CLIPTextConfig(**CLIP, hidden_act="relu")
    write_folder(transformers.CLIPTextModel(config), tmp_path / "clip")
    with pytest.raises(ConversionError, match="hidden_act = 'relu'"):
        plan_of(tmp_path / "clip", "text_encoder_2")


def edit_config(folder: Path, changes: dict) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_checkpoint_of_another_role_is_told(autoencoder, tmp_path) -> None:
    write_folder(autoencoder, tmp_path / "vae")
    with pytest.raises(ConversionError, match="looks like a HunyuanVideo VAE: give it as --vae"):
        plan_of(tmp_path / "vae", "text_encoder")


def damaged(tmp_path: Path, model) -> dict[str, tuple[Path, str]]:
    """Bad input -> (its path, what the message says)."""
    whole = write_folder(model, tmp_path / "whole") / "diffusion_pytorch_model.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    page = tmp_path / "page.pt"
    page.write_text("<html>not found</html>")
    pickled = tmp_path / "pickled.pt"
    torch.save({"x": Path("code")}, pickled)
    misnamed = {}
    for suffix, held in {
        ".safetensors": b"", ".pt": b"", ".bin": b"Entry not found",
        ".sft": b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>",
        ".ckpt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 25750000000\n",
        ".gguf": b"GGUF" + bytes(40), ".pth": whole.read_bytes(),
    }.items():  # fmt: skip
        misnamed[suffix] = tmp_path / f"misnamed{suffix}"
        misnamed[suffix].write_bytes(held)
    for name, zipped in (("new", True), ("old", False)):
        misnamed[name] = tmp_path / f"{name}.safetensors"
        torch.save(model.state_dict(), misnamed[name], _use_new_zipfile_serialization=zipped)
    misnamed["zip"] = tmp_path / "zip.safetensors"
    with zipfile.ZipFile(misnamed["zip"], "w") as archive:
        archive.writestr("model.safetensors", b"")
    numbers = tmp_path / "numbers.pt"
    torch.save({"loss": 3.0}, numbers)
    cut_pt = tmp_path / "cut.pt"
    torch.save(model.state_dict(), cut_pt)
    cut_pt.write_bytes(cut_pt.read_bytes()[:-100])
    lost = write_sharded(model, tmp_path / "lost")
    sorted(lost.glob("*.safetensors"))[1].unlink()
    lying = write_sharded(model, tmp_path / "lying")
    index = next(lying.glob("*.json.index.json"), next(lying.glob("*.index.json")))
    fields = json.loads(index.read_text())
    fields["weight_map"]["ghost"] = next(iter(fields["weight_map"].values()))
    index.write_text(json.dumps(fields))
    several = write_folder(model, tmp_path / "several")
    (several / "other.safetensors").write_bytes(whole.read_bytes())
    (tmp_path / "empty").mkdir()
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / "__0_0.distcp").touch()
    (tmp_path / "notes.txt").write_text("names")
    return {
        "cut": (cut, "not a complete safetensors file"),
        "page": (page, "is a web page"),
        "pickled": (pickled, "plain tensors"),
        "numbers": (numbers, "no state dict"),
        "cut.pt": (cut_pt, "not a complete PyTorch checkpoint"),
        "lost": (lost, "download the missing shards"),
        "lying": (lying, "do not hold: ghost"),
        "several": (several, "give the path of one file"),
        "empty": (tmp_path / "empty", "has no checkpoint"),
        "dcp": (tmp_path / "dcp", "format_utils dcp_to_torch"),
        "absent": (tmp_path / "absent", "does not exist"),
        "notes": (tmp_path / "notes.txt", "is not a checkpoint"),
        "no bytes": (misnamed[".safetensors"], "is empty; download it again"),
        "no bytes.pt": (misnamed[".pt"], "is empty; download it again"),
        "answer": (misnamed[".bin"], "is a text file, .* begins 'Entry not found'"),
        "sign in": (misnamed[".sft"], "is a web page"),
        "pointer": (misnamed[".ckpt"], "is a Git LFS pointer to 25,750.0 MB, .*git lfs pull"),
        "gguf": (misnamed[".gguf"], "is a GGUF file"),
        "safetensors.pth": (misnamed[".pth"], r"is a safetensors file .* end in \.safetensors"),
        "new.pt": (misnamed["new"], r"is a PyTorch file .* end in \.pt"),
        "old.pt": (misnamed["old"], r"is a PyTorch file .* end in \.pt"),
        "zip": (misnamed["zip"], "is a zip archive; unpack it"),
    }


def test_bad_files_are_named(base, tmp_path) -> None:
    for name, (path, said) in damaged(tmp_path, base).items():
        with pytest.raises(ConversionError, match=said) as error:
            weight_files.open_checkpoint(path)
        assert str(path) in str(error.value), name


@pytest.mark.golden
def test_a_tokenizer_that_is_a_pointer_is_named(golden, framepack, tmp_path) -> None:
    """Before the bundle is written, and not when it is sampled from."""
    shutil.copytree(
        golden / "diffusers_pipeline" / "pipeline" / "tokenizer", tmp_path / "tokenizer"
    )
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 9100000\n"
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(pointer)
    flags = BundleRequest(
        output=str(tmp_path / "out"), transformer=write_folder(framepack, tmp_path / "model"),
        tokenizer=tmp_path / "tokenizer",
    )  # fmt: skip
    with pytest.raises(ConversionError, match=r"tokenizer\.json is a Git LFS pointer to 9\.1 MB"):
        make_bundle(flags)
    assert not (tmp_path / "out").exists()


def test_pt_without_torch_names_the_extra(tmp_path, monkeypatch) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConversionError, match=r"pip install 'framepack-jax\[torch\]'"):
        weight_files.open_checkpoint(tmp_path / "x.pt")
