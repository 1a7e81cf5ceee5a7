"""Formats and types of checkpoints: all give the same leaves."""

import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import (
    HunyuanVideoFramepackTransformer3DModel,
)
from safetensors.torch import save_file

from framepack_jax.conversion import weight_files
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.utils import prefetch
from tests.fixtures.checkpoints import (
    CFG,
    assert_every_number_moved_once,
    fused,
    plan_of,
    state_of,
    write_folder,
    write_sharded,
)

PARITY = 2e-4


def write_lone_file(model, folder: Path) -> Path:
    """No config: its sizes are told by shapes."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "any name.safetensors")
    return folder / "any name.safetensors"


def write_torch(wrap):
    def write(model, folder: Path) -> Path:
        folder.mkdir()
        torch.save(wrap(model.state_dict()), folder / "model.pt")
        return folder / "model.pt"

    return write


def write_old_torch(model, folder: Path) -> Path:
    """The format before zip files, which cannot be mapped."""
    folder.mkdir()
    file = folder / "model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    return folder


FORMATS = {
    "folder": write_folder,
    "sharded": write_sharded,
    "lone file": write_lone_file,
    "pt": write_torch(lambda state: state),
    "pt module": write_torch(lambda state: {"module": dict(state)}),
    "pt state_dict": write_torch(lambda state: {"state_dict": dict(state), "step": 7}),
    "old bin": write_old_torch,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same(name: str, framepack, tmp_path) -> None:
    plan = plan_of(FORMATS[name](framepack, tmp_path / "model"), rope_axes=(4, 6, 6))
    assert plan.cfg == CFG
    leaves = dict(plan.leaves())
    tensors = state_of(framepack)
    assert_every_number_moved_once(leaves, tensors)
    assert plan.nbytes() == sum(leaf.nbytes for leaf in leaves.values())
    names = [f"transformer_blocks.1.attn.to_{x}.weight" for x in "qkv"]
    np.testing.assert_array_equal(leaves["double/01/img_qkv/kernel"], fused(tensors, names))


@pytest.mark.parametrize("name", ["lone file", "pt"])
def test_bfloat16_keeps_its_bits(name: str, framepack, tmp_path) -> None:
    model = HunyuanVideoFramepackTransformer3DModel.from_config(framepack.config)
    model.load_state_dict(framepack.state_dict())
    model = model.to(torch.bfloat16)
    plan = plan_of(FORMATS[name](model, tmp_path / "model"), rope_axes=(4, 6, 6))
    leaves = dict(plan.leaves())
    read = plan.source.checkpoint.read("proj_out.bias")
    assert {x.dtype for x in [read, *leaves.values()]} == {np.dtype(ml_dtypes.bfloat16)}
    bits = {n: t.view(torch.int16).numpy() for n, t in model.state_dict().items()}
    assert_every_number_moved_once({p: x.view(np.int16) for p, x in leaves.items()}, bits)
    theirs = bits["transformer_blocks.0.ff.net.0.proj.weight"]
    np.testing.assert_array_equal(leaves["double/00/img_mlp_in/kernel"].view(np.int16), theirs.T)
    as_float = dict(plan.leaves("float32"))["double/00/img_mlp_in/kernel"]
    assert as_float.dtype == np.float32
    assert plan.nbytes("float32") == 2 * plan.nbytes()


@pytest.mark.parametrize(
    ("types", "expected"),
    [("hhb", "float32"), ("bbf", "float32"), ("bbb", "bfloat16"), ("hhf", "float32")],
)
def test_fused_tensors_of_mixed_types(types: str, expected: str, framepack, tmp_path) -> None:
    """In the narrowest type that holds them all; numbers of each stay as they are."""
    dtypes = {"h": torch.float16, "b": torch.bfloat16, "f": torch.float32}
    names = [f"transformer_blocks.1.attn.to_{x}.weight" for x in "qkv"]
    state = dict(framepack.state_dict())
    for name, letter in zip(names, types, strict=True):
        state[name] = state[name].to(dtypes[letter])
    save_file(state, tmp_path / "x.safetensors")
    plan = plan_of(tmp_path / "x.safetensors", rope_axes=(4, 6, 6))
    leaves = dict(plan.leaves())
    kernel = leaves["double/01/img_qkv/kernel"]
    assert str(kernel.dtype) == expected
    tensors = {name: state[name].float().numpy() for name in names}
    np.testing.assert_array_equal(kernel.astype(np.float32), fused(tensors, names))
    assert plan.nbytes() == sum(leaf.nbytes for leaf in leaves.values())


def test_numbers_that_a_type_cannot_hold_are_named(framepack, tmp_path) -> None:
    state = dict(framepack.state_dict())
    state["proj_out.bias"] = state["proj_out.bias"].clone()
    state["proj_out.bias"][:2] = 70_000
    save_file(state, tmp_path / "x.safetensors")
    plan = plan_of(tmp_path / "x.safetensors", rope_axes=(4, 6, 6))
    with pytest.raises(ConversionError, match=r"head/out/bias holds 2 numbers .* up to 7e\+04"):
        list(plan.leaves("float16"))
    list(plan.leaves("bfloat16"))


def test_few_tensors_are_read_at_a_time(framepack, tmp_path, monkeypatch) -> None:
    """Opening and planning read no weights, and leaves are made little before they are asked for,
    each of three tensors at most."""
    path = write_folder(framepack, tmp_path / "model")
    read = []
    original = weight_files.Checkpoint.read
    monkeypatch.setattr(
        weight_files.Checkpoint,
        "read",
        lambda self, name: read.append(name) or original(self, name),
    )
    leaves = plan_of(path).leaves()
    assert read == []
    next(leaves)
    time.sleep(0.5)
    few = len(read)
    assert 1 <= few <= 3 * (1 + prefetch.AHEAD)
    list(leaves)
    assert len(read) > 2 * few
