"""Files with code, false headers or paths are refused and never run."""

import json
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import save, save_file

from framepack_jax.cli.convert import main
from framepack_jax.conversion import engine, inspect, latent_statistics, tables, weight_files
from framepack_jax.conversion.weight_files import ConversionError, Entry, open_checkpoint
from framepack_jax.models.hunyuan.config import VaeConfig
from framepack_jax.models.hunyuan.spec import VAE
from tests.fixtures.checkpoints import RELEASED, plan_of, small_state


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return (exec, (f"open({str(self.proof)!r}, 'w').close()",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["file", "tensors", "wrapper"])
def test_code_in_a_pickle_is_refused_and_not_run(place: str, zipped: bool, tmp_path) -> None:
    proof, file = tmp_path / "proof", tmp_path / "model.pt"
    harm = Harm(proof)
    stored = {
        "file": harm,
        "tensors": {**small_state(), "e": harm},
        "wrapper": {"module": small_state(), "optimizer": harm},
    }[place]
    torch.save(stored, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SystemExit) as stopped:
        main(["--transformer", str(file), "--output", str(tmp_path / "out")])
    assert str(stopped.value.code).startswith(f"error: {file} is not a complete PyTorch checkpoint")
    assert "\n" not in stopped.value.code and not proof.exists()
    # The same file does harm to who trusts it.
    torch.load(file, weights_only=False)
    assert proof.exists()


def test_pytorch_files_are_mapped_and_trusted_with_weights_only(tmp_path, monkeypatch) -> None:
    torch.save(small_state(), tmp_path / "x.pt")
    options = {}
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda f, **given: options.update(given) or load(f, **given))
    open_checkpoint(tmp_path / "x.pt")
    assert options["weights_only"] is True and options["mmap"] is True


def test_cut_files_are_refused(tmp_path) -> None:
    data = save(small_state())
    torch.save(small_state(), tmp_path / "whole.pt")
    archive = (tmp_path / "whole.pt").read_bytes()
    for whole, file in ((data, tmp_path / "x.safetensors"), (archive, tmp_path / "x.pt")):
        for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            said = "is not a complete" if length else "is empty"
            with pytest.raises(ConversionError, match=f"{file} {said}"):
                open_checkpoint(file)
        file.write_bytes(whole)
        assert set(open_checkpoint(file).names()) == set(small_state())


@pytest.mark.parametrize("claimed", [2**60, 2**63, 2**64 - 1, 10**8, 99_999_999])
def test_a_header_that_claims_too_much(claimed: int, tmp_path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", claimed) + b"{}")
    began = time.monotonic()
    with pytest.raises(ConversionError, match="not a complete safetensors file"):
        open_checkpoint(file)
    assert time.monotonic() - began < 1


def index_of(folder: Path, **files: object) -> Path:
    """A folder with an index {tensor: file}."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"weight_map": files})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "{tmp}/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors"],
)
def test_an_index_stays_in_its_folder(name: str, tmp_path) -> None:
    save_file(small_state(), tmp_path / "x.safetensors")
    folder = index_of(
        tmp_path / "model", **{"a.weight": name.format("x.safetensors", tmp=tmp_path)}
    )
    (folder / "a").mkdir()
    with pytest.raises(ConversionError, match="names files outside its folder"):
        open_checkpoint(folder)


def test_an_index_may_name_links_and_folders_inside(tmp_path) -> None:
    """The hub's cache is made of links out of the folder."""
    save_file(small_state(), tmp_path / "blob")
    folder = index_of(tmp_path / "model", **{"a.weight": "x.safetensors", "c": "in/y.safetensors"})
    (folder / "x.safetensors").symlink_to("../blob")
    (folder / "in").mkdir()
    save_file({"e": torch.zeros(2), "c": torch.zeros(1)}, folder / "in" / "y.safetensors")
    checkpoint = open_checkpoint(folder)
    assert {*small_state(), "e"} <= set(checkpoint.names())


def test_shards_of_pytorch_files(tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(small_state())}
    for file in set(places.values()):
        held = {name: tensor for name, tensor in small_state().items() if places[name] == file}
        torch.save(held, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert set(open_checkpoint(folder).names()) == set(small_state())


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, {"a": None}, {"a": ""}, "x"])
def test_an_index_without_a_map(weight_map, tmp_path) -> None:
    folder = index_of(tmp_path / "model")
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConversionError, match="has no weight_map"):
        open_checkpoint(folder)


def test_deep_json_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ConversionError, match="is not a JSON file"):
        weight_files.read_json(tmp_path / "config.json")


def test_all_that_is_wrong_with_shards_is_told_together(framepack, tmp_path) -> None:
    """Duplicate, missing, extra and misshapen tensors, and a layer that is not there."""
    state = {k: v for k, v in framepack.items() if "single_transformer_blocks.1." not in k}
    del state["transformer_blocks.0.norm1.linear.bias"]
    state["norm_out.linear.weight"] = torch.zeros(64, 31)
    state["strange"] = torch.zeros(1)
    names = sorted(state)
    shards = {"1.safetensors": names[:60], "2.safetensors": [*names[50:], names[0]]}
    folder = index_of(
        tmp_path / "model", **{name: file for file, held in shards.items() for name in held}
    )
    for file, held in shards.items():
        save_file({name: state[name].clone() for name in held}, folder / file)
    with pytest.raises(ConversionError) as error:
        plan_of(folder, rope_axes=(4, 6, 6))
    for part in (
        "layers absent (1): single_transformer_blocks.1\n",
        "tensors missing (1): transformer_blocks.0.norm1.linear.bias\n",
        "norm_out.linear.weight is (64, 31), expected (64, 32)",
        f"no place for (12): {names[0]} (again, in 2.safetensors)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, np.nan), (torch.bfloat16, np.inf), (torch.float16, -np.inf)],
)
def test_weights_that_are_no_numbers_are_named(dtype, value: float, framepack, tmp_path) -> None:
    name = "transformer_blocks.1.attn.to_k.weight"
    bad = framepack[name].clone()
    bad[3, 4] = bad[0, 0] = value
    state = {k: (bad if k == name else v).to(dtype) for k, v in framepack.items()}
    save_file(state, tmp_path / "x.safetensors")
    plan = plan_of(tmp_path / "x.safetensors", rope_axes=(4, 6, 6))
    with pytest.raises(ConversionError, match=f"{name} holds 2 numbers of 1024 that are NaN or"):
        list(plan.leaves())
    # The largest numbers of a type are numbers.
    bad[3, 4] = bad[0, 0] = torch.finfo(dtype).max
    save_file({k: (bad if k == name else v).to(dtype) for k, v in framepack.items()},
              tmp_path / "x.safetensors")  # fmt: skip
    list(plan_of(tmp_path / "x.safetensors", rope_axes=(4, 6, 6)).leaves())


def test_a_strange_lora_is_described(tmp_path) -> None:
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {
        f"{module}.lora_down.weight": torch.tensor(1.0),
        f"{module}.lora_up.weight": torch.zeros(0, 3),
        f"{module}.alpha": torch.zeros(0),
    }
    save_file(state, tmp_path / "x.safetensors")
    assert "LoRA" in inspect.describe(tmp_path / "x.safetensors")
    state[f"{module}.alpha"] = torch.tensor(float("nan"))
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="alpha holds 1 numbers of 1 that are NaN"):
        inspect.describe(tmp_path / "x.safetensors")


CONFIG_VALUES = (
    None, "x", -1, 0, 10**12, 1e300, True, [], {}, [[1]], "../x", float("nan"), "1" * 5000,
)  # fmt: skip
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.golden
def test_no_config_crashes(part: str, golden, tmp_path) -> None:
    """Every field of every config replaced by what does not belong there."""
    source = golden / "diffusers_pipeline" / "pipeline" / part
    folder = tmp_path / part
    folder.mkdir()
    for file in source.glob("*.safetensors*"):
        (folder / file.name).symlink_to(file.resolve())
    fields = json.loads((source / "config.json").read_text())
    random = np.random.default_rng(0)
    found = tables.recognise(open_checkpoint(folder), part)
    refused = 0
    for name in sorted(fields):
        for value in random.choice(np.array(CONFIG_VALUES, object), 4, replace=False):
            (folder / "config.json").write_text(json.dumps({**fields, name: value}))
            try:
                found.table.config(found)
                if part == "vae":
                    latent_statistics.read(found.checkpoint.config(), VAE, VaeConfig())
            except ConversionError as error:
                assert str(folder) in str(error) or "config.json" in str(error)
                refused += 1
    assert refused > len(fields)


def strange_shapes(
    entries: dict[str, Entry], random: np.random.Generator, changes: int = 3
) -> dict[str, Entry]:
    """The tensors of a network, a few of them of another shape, gone, or of a layer far away."""
    entries = dict(entries)
    for name in random.choice(sorted(entries), changes, replace=False):
        entry = entries.pop(name)
        match random.integers(3):
            case 0:
                sizes = random.choice([0, 1, 2, 3, 10**12], random.integers(6))
                entries[name] = entry._replace(shape=tuple(map(int, sizes)))
            case 1:
                entries[re.sub(r"\.\d+\.", f".{10**15}.", name, count=1)] = entry
    return entries


@pytest.mark.parametrize("role", [*RELEASED, "transformer", "vae"])
def test_no_shapes_crash(role: str, framepack, tmp_path) -> None:
    """Without a config, shapes and layer numbers are what there is to believe."""
    if role in RELEASED:
        model, sizes = RELEASED[role]
        with torch.device("meta"):
            state = model(model.config_class(**sizes, intermediate_size=6)).state_dict()
    elif role == "vae":
        with torch.device("meta"):
            state = AutoencoderKLHunyuanVideo().state_dict()
    else:
        state = framepack
    entries = {name: Entry(tuple(t.shape), "bfloat16", None) for name, t in state.items()}
    table = tables.TABLES[role][0]
    random, refused = np.random.default_rng(3), 0
    for _ in range(200):
        checkpoint = weight_files.Checkpoint(
            tmp_path / "x.safetensors", [], strange_shapes(entries, random, len(entries) // 4)
        )
        source = engine.Source(checkpoint, table, "", {"rope_axes": (4, 6, 6)})
        try:
            cfg = table.config(source)
        except ConversionError as error:
            assert "x.safetensors" in str(error)
            refused += 1
            continue
        assert all(0 < n <= 1000 for name, n in vars(cfg).items() if "layers" in name)
    assert refused > 40
