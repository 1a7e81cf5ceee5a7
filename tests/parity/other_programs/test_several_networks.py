"""Files with several networks, or with several sets of weights of one network."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

from framepack_jax import bundle
from framepack_jax.cli.convert import main
from framepack_jax.conversion import encoders, engine, export, float8, inspect, tables, weight_files
from framepack_jax.conversion.verify import compare
from framepack_jax.conversion.weight_files import ConversionError
from tests.fixtures.checkpoints import (
    AXES,
    FP8,
    assert_same,
    entry,
    leaves_of,
    plan_of,
    repackaged,
    write,
)
from tests.fixtures.comfyui import State, comfyui_vae


def test_averaged_weights_are_never_guessed(framepack, tmp_path, capsys) -> None:
    """A trainer's file with plain weights, averaged ones, and what else it keeps."""
    averaged = {name: tensor + 1 for name, tensor in framepack.items()}
    trainer = {
        "model": dict(framepack), "ema": {"module": averaged}, "step": 7,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "groups": [1]},
    }  # fmt: skip
    file = tmp_path / "trainer.pt"
    torch.save(trainer, file)
    with pytest.raises(ConversionError, match=r"with --prefix ema\.module\. or --prefix model\.$"):
        plan_of(file)
    flags = ["--transformer", str(file), "--rope-axes", "4,6,6", "--output"]
    with pytest.raises(SystemExit, match=r"choose one with --prefix ema\.module\. or"):
        main([*flags, str(tmp_path / "out"), "--prefix", "student"])
    main([*flags, str(tmp_path / "out"), "--prefix", "ema.module"])
    said = capsys.readouterr().out
    assert "prefix ema.module. removed; optimizer.state.0.exp_avg left out" in said
    plain = write(framepack, tmp_path / "plain.safetensors")
    ema = write(averaged, tmp_path / "ema.safetensors")
    assert [bool(compare(f, str(tmp_path / "out"))[0].differing) for f in (plain, ema)] == [1, 0]
    # Averaged weights alone are what there is.
    torch.save({"ema": averaged, "step": 7}, file)
    assert_same(leaves_of(file, **AXES), leaves_of(ema, **AXES))
    assert "PyTorch; its dict 'ema'" in inspect.describe(file)
    with pytest.raises(SystemExit, match=r"--prefix model\.: no network .* are behind ''"):
        main([*flags, str(tmp_path / "other"), "--prefix", "model."])


def test_plain_weights_beside_averaged_ones(framepack, tmp_path) -> None:
    """The plain ones behind no prefix: those averaged are no strange tensors of theirs."""
    both = framepack | {f"ema.{name}": tensor + 1 for name, tensor in framepack.items()}
    file = write(both, tmp_path / "both.safetensors")
    with pytest.raises(ConversionError, match=r"choose one with --prefix '' or --prefix ema\.$"):
        plan_of(file)
    assert inspect.describe(file).count("transformer in diffusers' naming") == 2
    source = tables.recognise(weight_files.open_checkpoint(file), "transformer", "")
    leaves = dict(engine.make_job(dataclasses.replace(source, overrides=AXES)).leaves())
    assert_same(leaves, leaves_of(write(framepack, tmp_path / "plain.safetensors"), **AXES))


def llama_state(root: Path, manifest: bundle.Manifest) -> State:
    """The text encoder of a bundle as its checkpoint was, but for the last layers, which a bundle
    does not keep."""
    _, cfg = bundle.role_config(manifest, "text_encoder")
    state = {}
    for step in engine.steps_of(encoders.LLAMA, cfg):
        held = bundle.read_leaves(root, manifest, "text_encoder", step.targets)
        leaves = [leaf for _, leaf in held]
        arrays = export.invert(step.row.transform, leaves, step.source_shapes())
        state |= dict(zip(step.sources, map(as_torch, arrays), strict=True))
    for name in [name for name in state if name.startswith("layers.0.")]:
        for unread in range(cfg.layers, cfg.layers + encoders.UNUSED_LAYERS):
            state[name.replace("layers.0.", f"layers.{unread}.")] = torch.zeros(state[name].shape)
    return state | {"norm.weight": torch.zeros(cfg.width)}


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype != ml_dtypes.bfloat16:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The networks of the bundle `random`, but for the image encoder, in one file as ComfyUI saves
    them."""
    root = bundle.resolve("random")
    manifest = bundle.read_manifest(root)

    def exported(role: str) -> State:
        network = export.Export(root, manifest, role)
        names = [tensor.name for tensor in network.tensors]
        return dict(zip(names, map(as_torch, network.arrays()), strict=True))

    networks = {
        "model.diffusion_model.": exported("transformer"),
        "vae.": comfyui_vae(exported("vae")),
        "text_encoders.llama.transformer.model.": llama_state(root, manifest),
        "text_encoders.clip_l.transformer.": exported("text_encoder_2"),
        "text_encoders.clip_l.": {"logit_scale": torch.tensor(4.6)},
        "": {"text_encoders.llama.transformer.scaled_fp8": torch.zeros(2, dtype=FP8)},
    }
    state = {p + name: tensor for p, held in networks.items() for name, tensor in held.items()}
    return write(state, tmp_path_factory.mktemp("whole") / "all_in_one.safetensors")


ENCODERS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def test_a_whole_checkpoint_is_taken_apart(whole, tmp_path, capsys) -> None:
    flags = ["--pipeline", str(whole), "--encoders-from", "random"]
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--output", str(tmp_path / "out")])
    assert "--tokenizer;" in stopped.value.code and "--tokenizer-2;" in stopped.value.code
    for name in ("tokenizer", "tokenizer_2"):
        flags += [f"--{name.replace('_', '-')}", str(bundle.resolve("random") / name)]
    main([*flags, "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    for prefix in (
        "model.diffusion_model.",
        "vae.",
        "text_encoders.clip_l.transformer.text_model.",
    ):
        assert f"prefix {prefix} removed" in said
    manifest = bundle.read_manifest(tmp_path / "out")
    assert [r for r in bundle.ROLES if manifest.roles[r].path == r] == list(ENCODERS)
    for root in (tmp_path / "out", bundle.resolve("random")):
        results = compare(whole, str(root))
        assert [(r.role, r.differing) for r in results] == [(role, []) for role in ENCODERS]
    main(["--vae", str(whole), "--encoders-from", "random", "--output", str(tmp_path / "vae")])
    said = capsys.readouterr().out
    assert "also holds transformer, text_encoder, text_encoder_2; to convert all" in said
    # Without a bundle the toy encoders' sizes are not known; a real one's are.
    said = inspect.describe(whole)
    assert said.count("  prefix ") == 4 and f"convert with --pipeline {whole}" in said


def test_a_whole_checkpoint_of_released_sizes_fits_without_a_config(framepack, tmp_path) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo().state_dict()
    entries = {f"vae.{n}": entry(tuple(t.shape)) for n, t in comfyui_vae(vae).items()}
    for role, place in (("text_encoder", "llama"), ("text_encoder_2", "clip_l")):
        prefix = f"text_encoders.{place}.transformer."
        entries |= {prefix + name: held for name, held in repackaged(role).items()}
    entries |= {
        f"model.model.{name}": entry(tuple(tensor.shape)) for name, tensor in framepack.items()
    }
    entries["model.model.transformer_blocks.0.ff.net.2.weight"] = entry((32, 64), "float8_e4m3fn")
    path = tmp_path / "whole.safetensors"
    # The weights of Llama alone are marked as scaled.
    entries, _ = float8.unpack(path, [], entries)
    # Belongs to none of them.
    (tmp_path / "config.json").write_text("{}")
    found = tables.networks(weight_files.Checkpoint(path, [], entries))
    assert list(found) == list(ENCODERS)
    for role in ENCODERS[1:]:
        (source,) = found[role]
        engine.make_job(source)
    (source,) = found["transformer"]
    plan = engine.make_job(dataclasses.replace(source, overrides=AXES))
    assert plan.cfg.context_kernels == ("k1", "k2", "k4")
