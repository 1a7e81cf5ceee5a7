"""UMT5 under every name that it is published under."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from framepack_jax.conversion import engine, tables
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models.encoders import umt5
from framepack_jax.models.encoders.umt5 import Umt5Config
from framepack_jax.models.params import stack_layers
from tests.fixtures.checkpoints import (
    FP8,
    UMT5,
    abstract_checkpoint,
    assert_every_number_moved_once,
    assert_same,
    leaves_of,
    plan_of,
    write,
    write_folder,
)
from tests.fixtures.comfyui import State
from tests.fixtures.torch_reference import randomize, relative_error

# Names in transformers -> names in Wan's release, written apart from the tables.
WAN = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.norm1."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.norm2."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.", r"blocks.\1.attn.\2."),
    (
        r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.",
        r"blocks.\1.pos_embedding.embedding.",
    ),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"blocks.\1.ffn.gate.0."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"blocks.\1.ffn.fc2."),
)
CONFIG = transformers.UMT5Config(**UMT5)


@pytest.fixture(scope="module")
def model() -> transformers.UMT5EncoderModel:
    return randomize(transformers.UMT5EncoderModel(CONFIG), 9)


@pytest.fixture(scope="module")
def state(model) -> State:
    """The tensors of the model, the shared table once."""
    return {n: t for n, t in model.state_dict().items() if n != "encoder.embed_tokens.weight"}


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> dict[str, np.ndarray]:
    folder = write_folder(model, tmp_path_factory.mktemp("umt5") / "model")
    plan = plan_of(folder, "text_encoder")
    assert plan.cfg == Umt5Config(
        vocab_size=50, width=24, layers=3, heads=4, head_dim=6, mlp_width=40, buckets=8,
        max_distance=20,
    )  # fmt: skip
    return dict(plan.leaves())


def wan_name(name: str) -> str:
    for pattern, replacement in WAN:
        name = re.sub(pattern, replacement, name)
    return name


def test_every_number_moves_once(expected, state) -> None:
    assert_every_number_moved_once(expected, {k: v.numpy() for k, v in state.items()})
    theirs = state["encoder.block.2.layer.0.SelfAttention.k.weight"].numpy()
    np.testing.assert_array_equal(expected["layers/02/k/kernel"][:, 1, 3], theirs[6 + 3])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_names_of_wans_release(suffix: str, state, expected, tmp_path) -> None:
    renamed = {wan_name(name): tensor for name, tensor in state.items()}
    assert not any(name.startswith(("shared", "encoder")) for name in renamed)
    file = tmp_path / f"models_t5_umt5-xxl-enc-bf16{suffix}"
    CONFIG.save_pretrained(tmp_path)
    (torch.save if suffix == ".pth" else save_file)(renamed, file)
    plan = plan_of(file, "text_encoder")
    assert plan.source.table.description == "UMT5 text encoder in Wan's naming"
    assert_same(dict(plan.leaves()), expected)


def test_a_whole_model_and_a_table_kept_twice(state, expected, tmp_path) -> None:
    whole = transformers.UMT5ForConditionalGeneration(CONFIG)
    tensors = {k: v.clone() for k, v in (whole.state_dict() | state).items()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    CONFIG.save_pretrained(tmp_path)
    file = write(tensors, tmp_path / "model.safetensors")
    assert_same(leaves_of(file, "text_encoder"), expected)


def test_comfyuis_scaled_file(state, tmp_path) -> None:
    """Matrices in 8 bits, each with a scale, and the tokenizer beside them."""
    stored = {"scaled_fp8": torch.zeros(0, dtype=FP8), "spiece_model": torch.arange(9).byte()}
    meant = {}
    for name, tensor in state.items():
        stored[name] = meant[name] = tensor.half()
        if tensor.ndim == 2 and name.startswith("encoder") and "bias" not in name:
            stored[name] = tensor.to(FP8)
            stored[name.removesuffix("weight") + "scale_weight"] = torch.tensor(0.7)
            meant[name] = (stored[name].float() * 0.7).to(torch.bfloat16)
    assert len(stored) == 2 + len(state) + 7 * 3
    found = []
    for name, tensors in {"stored": stored, "meant": meant}.items():
        CONFIG.save_pretrained(tmp_path / name)
        file = write(tensors, tmp_path / name / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
        found.append(leaves_of(file, "text_encoder"))
    assert_same(*found)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_kernels_are_quantized(dtype: str, model, expected, tmp_path) -> None:
    plan = plan_of(write_folder(model, tmp_path / "model"), "text_encoder")
    leaves = dict(plan.leaves(dtype))
    quantized = [path for path, leaf in leaves.items() if str(leaf.dtype) == dtype]
    assert len(quantized) == 7 * 3 and all(path.endswith("/kernel") for path in quantized)
    for path in quantized:
        ours = leaves[path].astype(np.float32) * leaves[f"{path}_scale"][None]
        assert relative_error(ours, expected[path]) < 0.07
    ids, valid = np.arange(12).reshape(2, 6), np.ones((2, 6), bool)
    ours, exact = (
        umt5.hidden_states(plan.cfg, stack_layers(each, umt5.STACKS, np.stack), ids, valid)
        for each in (leaves, expected)
    )
    assert relative_error(ours, exact) < 0.2


@pytest.mark.parametrize("naming", ["transformers", "wan"])
def test_released_sizes_are_known_by_width(naming: str, tmp_path) -> None:
    """Wan's release has the transformer's `config.json` in the folder."""
    thin = {"vocab_size": 7, "num_layers": 2, "d_ff": 6}
    sizes = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        live = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes, **thin))
    state = live.state_dict()
    if naming == "wan":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "t2v", "dim": 5120}))
        del state["encoder.embed_tokens.weight"]
        state = {wan_name(name): tensor for name, tensor in state.items()}
    source = tables.recognise(abstract_checkpoint(state, tmp_path), "text_encoder")
    cfg = engine.make_job(source).cfg
    assert cfg == dataclasses.replace(Umt5Config(), vocab_size=7, layers=2, mlp_width=6)
    narrow = {k: v[tuple(slice(n // 2) for n in v.shape)] for k, v in state.items()}
    with pytest.raises(ConversionError, match=r"with width 2048 needs its config\.json"):
        engine.make_job(tables.recognise(abstract_checkpoint(narrow, tmp_path), "text_encoder"))


def test_t5_is_refused(tmp_path) -> None:
    """It has the same names, and a position bias in the first layer only."""
    sizes = {"num_layers": 2, "vocab_size": 9, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2}
    t5 = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    with pytest.raises(
        ConversionError, match=r"no text encoder: .*relative_attention_bias\.weight"
    ):
        plan_of(write_folder(t5, tmp_path / "t5"), "text_encoder")


def test_ungated_layers_are_refused(model, tmp_path) -> None:
    folder = write_folder(model, tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"feed_forward_proj": "relu"}))
    with pytest.raises(ConversionError, match="feed_forward_proj = 'relu'; only 'gated-gelu'"):
        plan_of(folder, "text_encoder")
