"""LoRA files that we write, read by diffusers, PEFT, ComfyUI and ourselves."""

import copy
import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from diffusers import HunyuanVideoFramepackPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from framepack_jax.conversion import lora as files
from framepack_jax.conversion import lora_fusion, lora_names
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import lora
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.lora import Factors
from framepack_jax.models.lora_layers import scale_factors
from framepack_jax.models.params import merge_params, stack_layers, unstack_layers
from framepack_jax.training import state
from framepack_jax.training.config import LoRAConfig, TrainConfig
from tests.fixtures.comfyui import comfyui
from tests.fixtures.lora import (
    PARITY,
    assert_same_lora,
    changes,
    kohya,
    pipeline_keys,
    random_lora,
    scaled_into_b,
    torch_velocity,
    velocity,
)
from tests.fixtures.torch_reference import relative_error

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch


def test_diffusers_loads_what_is_written(peft, module, model, inputs, tmp_path) -> None:
    file, theirs = peft
    cfg, _ = model
    read = files.read(file, cfg).lora
    files.write(tmp_path / "out" / "x.safetensors", read, cfg)
    adapted = copy.deepcopy(module)
    adapted.load_lora_adapter(tmp_path / "out", weight_name="x.safetensors")
    assert relative_error(torch_velocity(adapted, inputs), theirs) < 1e-6
    # Every bit of the down factors, the others with the scale in them, and no other file.
    written = load_file(tmp_path / "out" / "x.safetensors")
    expected = pipeline_keys(load_file(file))
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        if ".lora_A." in name:
            np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    again = files.read(tmp_path / "out" / "x.safetensors", cfg).lora
    assert_same_lora(again, {path: scaled_into_b(factors) for path, factors in read.items()})
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.safetensors"]


def test_what_training_makes_gives_the_same_in_diffusers(
    module, model, arguments, inputs, tmp_path
) -> None:
    """The factors as the trainer keeps them, q, k and v on one; its export; PEFT's own output."""
    cfg, params = model
    run = TrainConfig(trainable="lora", lora=LoRAConfig(rank=3, alpha=4.5))
    targets = state.lora_targets(run.lora, TRANSFORMER)
    factors = state.init_lora(run.lora, targets, params, jax.random.key(0))
    random = np.random.default_rng(1)
    factors = jax.tree.map(lambda x: x + 0.2 * random.standard_normal(x.shape, np.float32), factors)
    applied = merge_params(scale_factors(factors, state.factor_scale(run)), params)
    ours = velocity(cfg, applied, *arguments)
    files.write(tmp_path / "lora.safetensors", state.to_lora(run, factors), cfg)
    adapted = copy.deepcopy(module)
    adapted.load_lora_adapter(tmp_path, weight_name="lora.safetensors")
    assert relative_error(ours, torch_velocity(adapted, inputs)) < PARITY
    assert relative_error(ours, torch_velocity(module, inputs)) > 0.05


@pytest.mark.golden
def test_tencent_names_come_out_as_they_went_in(original, tmp_path) -> None:
    tensors = kohya(original)
    save_file(tensors, tmp_path / "in.safetensors")
    read = files.read(tmp_path / "in.safetensors", original.cfg).lora
    files.write(tmp_path / "out.safetensors", read, original.cfg, "kohya-tencent")
    written = load_file(tmp_path / "out.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


@pytest.mark.golden
def test_comfyui_finds_its_modules_in_what_is_written(original, tmp_path) -> None:
    """Under the keys that its `comfy/lora.py` looks up, `diffusion_model.` and the module's name
    in its own state dict, lie Tencent's factors."""
    save_file(kohya(original), tmp_path / "in.safetensors")
    read = files.read(tmp_path / "in.safetensors", original.cfg).lora
    files.write(tmp_path / "out.safetensors", read, original.cfg, "comfyui")
    written = load_file(tmp_path / "out.safetensors")
    for module, theirs in comfyui({name: name for name in original.tensors}).items():
        adapter = original.adapters.get(theirs.removesuffix(".weight"))
        if adapter is None:
            continue
        key = f"diffusion_model.{module.removesuffix('.weight')}"
        for suffix, expected in zip(
            ("lora_down.weight", "lora_up.weight", "alpha"), adapter, strict=True
        ):
            np.testing.assert_array_equal(written.pop(f"{key}.{suffix}"), np.float32(expected))
    assert not written
    found = files.read(tmp_path / "out.safetensors", original.cfg)
    assert "ComfyUI's" in found.naming
    assert_same_lora(found.lora, read)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("naming", lora_names.HUNYUAN.namings)
def test_trained_factors_go_out_and_in(naming: str, dtype, model, tmp_path) -> None:
    """The change is the same to the last bit of the factors, here at a scale of 1/2; ranks grow
    where kernels are parts of one matrix there."""
    cfg, _ = model
    made = {
        path: Factors(f.a.astype(dtype), f.b.astype(dtype), f.scale)
        for path, f in random_lora(cfg, 13, share=0.8).items()
    }
    files.write(tmp_path / "x.safetensors", made, cfg, naming)
    read = files.read(tmp_path / "x.safetensors", cfg).lora
    if lora_names.HUNYUAN.namings[naming].alpha is None:
        made = {path: scaled_into_b(factors) for path, factors in made.items()}
    assert_same_lora(read, made)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("naming", lora_names.HUNYUAN.namings)
def test_no_scale_is_lost(naming: str, dtype, model, tmp_path) -> None:
    """A reader that takes alpha tensors and knows no other alpha finds the whole change, also of a
    LoRA whose modules have ranks and scales of their own, none of them a power of two."""
    cfg, _ = model
    random = np.random.default_rng(3)
    made = {
        path: Factors(f.a.astype(dtype), f.b.astype(dtype), f.scale * random.uniform(0.01, 3))
        for path, f in random_lora(cfg, 18, ranks=(1, 2, 5)).items()
    }
    file = tmp_path / "x.safetensors"
    files.write(file, made, cfg, naming)
    for path, change in changes(files.read(file, cfg).lora).items():
        assert relative_error(change, changes(made)[path]) < 1e-6, path
    tensors = load_file(file)
    spelling = lora_names.HUNYUAN.namings[naming]
    if spelling.alpha is None:
        # The same again without the header.
        save_file(tensors, tmp_path / "bare.safetensors")
        bare = files.read(tmp_path / "bare.safetensors", cfg).lora
        assert_same_lora(bare, files.read(file, cfg).lora)
        assert {s for f in bare.values() for s in f.scale} == {1.0}
    else:
        assert {x.shape for n, x in tensors.items() if n.endswith(".alpha")} == {()}
    downs = [x for n, x in tensors.items() if "lora_A" in n or "lora_down" in n]
    assert (len({len(x) for x in downs}) == 1) == spelling.one_rank


def test_diffusers_and_peft_agree_with_us(module, model, arguments, inputs, tmp_path) -> None:
    """On a LoRA of many ranks and alphas: diffusers' pipeline by the header, its model from a dict
    of tensors without one, PEFT by the header, and our reader."""
    cfg, params = model
    made = random_lora(cfg, 19, ranks=(1, 2, 5), share=0.8)
    made = {p: f._replace(scale=f.scale * (0.1 + 0.2 * i)) for i, (p, f) in enumerate(made.items())}
    file = tmp_path / "x.safetensors"
    files.write(file, made, cfg)
    leaves = unstack_layers(jax.device_get(params), TRANSFORMER.stacks)
    for path, change in changes(files.read(file, cfg).lora).items():
        leaves[path] = leaves[path] + np.float32(change)
    ours = velocity(cfg, stack_layers(leaves, TRANSFORMER.stacks, np.stack), *arguments)
    assert relative_error(ours, torch_velocity(module, inputs)) > 0.05
    tensors, metadata = HunyuanVideoFramepackPipeline.lora_state_dict(
        file, return_lora_metadata=True
    )
    for header in (metadata, None):
        adapted = copy.deepcopy(module)
        HunyuanVideoFramepackPipeline.load_lora_into_transformer(tensors, adapted, metadata=header)
        assert relative_error(ours, torch_velocity(adapted, inputs)) < PARITY
    config = LoraConfig(**{k.removeprefix("transformer."): v for k, v in metadata.items()})
    by_peft = get_peft_model(copy.deepcopy(module), config)
    set_peft_model_state_dict(
        by_peft, {n.replace("transformer.", "base_model.model.", 1): x for n, x in tensors.items()}
    )
    assert relative_error(ours, torch_velocity(by_peft, inputs)) < PARITY


def test_the_header_says_where_a_lora_comes_from(model, tmp_path) -> None:
    """The given header, and that of the converted file; hashes of its tensors do not hold
    any more."""
    cfg, _ = model
    about = {"ss_steps": "7", "modelspec.title": "dance", "sshs_model_hash": "1"}
    made = random_lora(cfg, 20, share=0.2)
    files.write(tmp_path / "x.safetensors", made, cfg, "diffusers", about)
    again = files.about(tmp_path / "x.safetensors")
    files.write(tmp_path / "y.safetensors", made, cfg, "kohya", again)
    with safe_open(tmp_path / "y.safetensors", "np") as file:
        assert file.metadata() == {
            "format": "pt", "ss_steps": "7", "modelspec.title": "dance",
            "ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("naming", "said"),
    [
        ("kohya", ("4", "8")), ("comfyui", ("4", "8")),
        ("diffusers", ("4", "4")), ("original", ("4", "4")),
    ],
)  # fmt: skip
def test_the_header_says_rank_and_alpha_of_the_tensors(naming, said, model, tmp_path) -> None:
    """Also after a conversion: by alpha tensors, or alpha = rank where the scale is in the
    factors."""
    cfg, _ = model
    made = random_lora(cfg, 23, ranks=(4,))
    made = {p: f._replace(scale=np.full(4, 2.0)) for p, f in made.items() if "double/00" in p}
    about = {"ss_network_dim": "64", "ss_network_alpha": "1"}
    for other in ("kohya", "original"):
        files.write(tmp_path / f"{other}.safetensors", made, cfg, other, about)
        again = files.read(tmp_path / f"{other}.safetensors", cfg).lora
        file = tmp_path / f"from_{other}.safetensors"
        files.write(file, again, cfg, naming, files.about(tmp_path / f"{other}.safetensors"))
        with safe_open(file, "np") as tensors:
            header = tensors.metadata()
        downs = [x for n, x in load_file(file).items() if "lora_A" in n or "lora_down" in n]
        assert {len(x) for x in downs} == {4}
        expected = said if other == "kohya" else ("4", "4")
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == expected


def test_files_have_the_mode_of_their_neighbours(model, tmp_path) -> None:
    cfg, _ = model
    (tmp_path / "neighbour").touch()
    files.write(tmp_path / "x.safetensors", random_lora(cfg, 21, share=0.2), cfg)
    modes = [path.stat().st_mode for path in tmp_path.iterdir()]
    assert modes[0] == modes[1]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_joining_and_cutting_are_exact(data: st.DataObject) -> None:
    """Whatever of the parts share a factor, have a scale of their own, or are not there."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    numbers = st.integers(-3, 3).map(np.float32)

    def matrix(rows: int, columns: int) -> np.ndarray:
        cells = data.draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns))
        return np.array(cells, np.float32).reshape(rows, columns)

    shared = matrix(2, 3)
    parts: list[lora_fusion.Pair | None] = []
    for size in sizes:
        down = shared if data.draw(st.booleans()) else matrix(data.draw(st.integers(1, 3)), 3)
        scale = np.full(len(down), data.draw(st.sampled_from([1, 0.5])))
        pair = lora_fusion.Pair(down, matrix(size, len(down)), scale)
        parts.append(data.draw(st.sampled_from([pair, None])) if any(parts) else pair)

    def change(pair: lora_fusion.Pair | None, size: int) -> np.ndarray:
        return np.zeros((size, 3)) if pair is None else pair.up * pair.scale @ pair.down

    expected = [change(part, size) for part, size in zip(parts, sizes, strict=True)]
    fused = lora_fusion._join(parts, sizes)
    np.testing.assert_array_equal(change(fused, 0), np.concatenate(expected))
    cut = lora_fusion._cut(fused, sizes)
    for part, size, whole in zip(cut, sizes, expected, strict=True):
        np.testing.assert_array_equal(change(part, size), whole)


@pytest.mark.parametrize("naming", lora_names.HUNYUAN.namings)
def test_several_can_be_written_as_one(naming: str, model, tmp_path) -> None:
    """A module has one alpha: weights that differ are multiplied in, which rounds once."""
    cfg, _ = model
    both = lora.combine([(random_lora(cfg, 16), 0.7), (random_lora(cfg, 17), -0.3)])
    files.write(tmp_path / "x.safetensors", both, cfg, naming)
    expected = changes(both)
    for path, change in changes(files.read(tmp_path / "x.safetensors", cfg).lora).items():
        assert relative_error(change, expected.pop(path)) < 1e-6
    assert not expected


def test_untrained_adapters_are_written_too(model, tmp_path) -> None:
    """B = 0 is how training begins."""
    cfg, _ = model
    made = random_lora(cfg, 14)
    made = {path: f._replace(b=np.zeros_like(f.b)) for path, f in made.items()}
    files.write(tmp_path / "x.safetensors", made, cfg)
    assert files.read(tmp_path / "x.safetensors", cfg).lora.keys() == made.keys()


def test_what_cannot_be_written(model, tmp_path, monkeypatch) -> None:
    cfg, _ = model
    made = random_lora(cfg, 15)
    base = dataclasses.replace(cfg, context_kernels=())
    with pytest.raises(ConversionError, match=r"3 of .* not of this network: embed/context_k1"):
        files.write(tmp_path / "x.safetensors", made, base)
    with pytest.raises(ConversionError, match=r"expected diffusers, original, .*, comfyui"):
        files.write(tmp_path / "x.safetensors", made, cfg, "comfy")
    with pytest.raises(ConversionError, match="safetensors"):
        files.write(tmp_path / "x.pt", made, cfg)

    def full(file, *args, **kwargs) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "stream_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        files.write(tmp_path / "x.safetensors", made, cfg)
    assert not list(tmp_path.iterdir())
