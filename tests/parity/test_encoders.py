"""Llama, CLIP and SigLIP against live transformers at toy sizes, and their full sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from framepack_jax.models import registry
from framepack_jax.models.encoders import clip, llama, siglip
from framepack_jax.models.encoders.block import ACTIVATIONS
from framepack_jax.models.params import unstack_layers
from framepack_jax.models.quantization import cast_params
from tests.fixtures.reference_params import (
    clip_params,
    llama_params,
    siglip_params,
)
from tests.fixtures.torch_reference import randomize, relative_error

LLAMA = llama.LlamaConfig(
    vocab_size=50, width=24, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=40
)
CLIP = clip.ClipConfig(vocab_size=40, width=24, layers=2, heads=3, mlp_width=36, max_tokens=12)
# 17 pixels: three beyond the last whole patch.
SIGLIP = siglip.SiglipConfig(width=24, layers=2, heads=3, mlp_width=40, image_size=17, patch_size=7)

llama_states, clip_pooled, siglip_states = (
    jax.jit(f, static_argnums=0) for f in (llama.hidden_states, clip.pooled, siglip.hidden_states)
)


def state_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in module.state_dict().items()}


@functools.cache
def llama_reference() -> transformers.LlamaModel:
    config = transformers.LlamaConfig(
        vocab_size=LLAMA.vocab_size, hidden_size=LLAMA.width, num_hidden_layers=LLAMA.layers + 2,
        num_attention_heads=LLAMA.heads, num_key_value_heads=LLAMA.kv_heads,
        head_dim=LLAMA.head_dim, intermediate_size=LLAMA.mlp_width, rms_norm_eps=LLAMA.norm_eps,
        rope_parameters={"rope_theta": LLAMA.rope_theta, "rope_type": "default"},
    )  # fmt: skip
    return randomize(transformers.LlamaModel(config), 0)


def llama_inputs(lengths: tuple[int, ...], total: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(1).integers(0, LLAMA.vocab_size, (len(lengths), total))
    return ids, np.arange(total)[None, :] < np.asarray(lengths)[:, None]


@pytest.mark.parametrize("total", [11, 300])
def test_llama(total):
    ids, valid = llama_inputs((total - 4, total), total)
    with torch.no_grad():
        theirs = llama_reference()(
            torch.tensor(ids), torch.tensor(valid).long(), output_hidden_states=True
        ).hidden_states[-3]
    params = llama_params(state_of(llama_reference()), LLAMA)
    ours = llama_states(LLAMA, params, ids, valid)
    assert relative_error(ours[valid], theirs[torch.tensor(valid)]) < 1e-5


def test_llama_padding_cannot_be_seen():
    params = llama_params(state_of(llama_reference()), LLAMA)
    ids, valid = llama_inputs((5, 9), 9)
    both = llama_states(LLAMA, params, ids, valid)
    for row, length in enumerate((5, 9)):
        alone = llama_states(LLAMA, params, ids[row : row + 1, :length], np.ones((1, length), bool))
        assert relative_error(both[row : row + 1, :length], alone) < 1e-6


def clip_reference(eos_token_id: int, activation: str) -> transformers.CLIPTextModel:
    config = transformers.CLIPTextConfig(
        vocab_size=CLIP.vocab_size, hidden_size=CLIP.width, num_hidden_layers=CLIP.layers,
        num_attention_heads=CLIP.heads, intermediate_size=CLIP.mlp_width,
        max_position_embeddings=CLIP.max_tokens, hidden_act=activation,
        eos_token_id=eos_token_id, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return randomize(transformers.CLIPTextModel(config), 2)


# The legacy rule pools at the largest id (39 where it stands first); the new one at the first 7.
CLIP_IDS = np.array([
    [0, 5, 39, 7, 7, 1, 1, 1],
    [0, 7, 9, 3, 2, 39, 39, 39],
    [0, 30, 31, 32, 33, 34, 38, 7],
])  # fmt: skip


@pytest.mark.parametrize(
    ("eos", "activation", "theirs_name", "positions"),
    [(2, "quick_gelu", "quick_gelu", [2, 5, 6]), (7, "gelu", "gelu", [3, 1, 7])],
)
def test_clip(eos, activation, theirs_name, positions):
    reference = clip_reference(eos, theirs_name)
    cfg = clip.ClipConfig(**vars(CLIP) | {"eos_token_id": eos, "activation": activation})
    assert clip.end_of_text(cfg, CLIP_IDS).tolist() == positions
    with torch.no_grad():
        theirs = reference(torch.tensor(CLIP_IDS)).pooler_output
    ours = clip_pooled(cfg, clip_params(state_of(reference), cfg), CLIP_IDS)
    assert relative_error(ours, theirs) < 1e-5


def siglip_reference() -> transformers.SiglipVisionModel:
    config = transformers.SiglipVisionConfig(
        hidden_size=SIGLIP.width, num_hidden_layers=SIGLIP.layers,
        num_attention_heads=SIGLIP.heads, intermediate_size=SIGLIP.mlp_width,
        image_size=SIGLIP.image_size, patch_size=SIGLIP.patch_size,
    )  # fmt: skip
    return randomize(transformers.SiglipVisionModel(config), 3)


def test_siglip():
    reference = siglip_reference()
    pixels = np.random.default_rng(4).uniform(-1, 1, (2, 17, 17, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = reference(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state
    params = siglip_params(state_of(reference), SIGLIP)
    assert relative_error(siglip_states(SIGLIP, params, pixels), theirs) < 1e-5
    with pytest.raises(ValueError, match=r"\(14, 17, 3\), expected \(17, 17, 3\)"):
        siglip_states(SIGLIP, params, pixels[:, :14])


def test_activations():
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    torch_names = {"quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}
    for name, function in ACTIVATIONS.items():
        theirs = transformers.activations.ACT2FN[torch_names[name]](torch.tensor(x))
        assert relative_error(function(x), theirs) < 1e-6


@pytest.mark.parametrize(
    ("kind", "count"),
    [("llama", 7_068_958_720), ("clip_text", 123_060_480), ("siglip_vision", 412_987_248)],
)
def test_full_size(kind, count):
    assert registry.parameter_count(kind, registry.NETWORKS[kind].config()) == count


# Kind -> config, function, random parameters by way of transformers, inputs.
CASES = {
    "llama": (
        LLAMA,
        llama_states,
        lambda: llama_params(state_of(llama_reference()), LLAMA),
        llama_inputs((3,), 5),
    ),
    "clip_text": (
        CLIP,
        clip_pooled,
        lambda: clip_params(state_of(clip_reference(2, "quick_gelu")), CLIP),
        (CLIP_IDS,),
    ),
    "siglip_vision": (
        SIGLIP,
        siglip_states,
        lambda: siglip_params(state_of(siglip_reference()), SIGLIP),
        (np.ones((1, 17, 17, 3), np.float32),),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_bfloat16(kind):
    cfg, function, params, inputs = CASES[kind]
    exact = function(cfg, params(), *inputs)
    rounded = function(cfg, *cast_params([params(), *map(jnp.asarray, inputs)], jnp.bfloat16))
    assert (exact.dtype, rounded.dtype) == (jnp.float32, jnp.bfloat16)
    assert relative_error(rounded, exact) < 0.05


@pytest.mark.parametrize("kind", CASES)
def test_parameter_paths(kind):
    """`init` makes the paths and shapes that the parity tests feed in."""
    cfg, _, params, _ = CASES[kind]
    fed = unstack_layers(params(), registry.NETWORKS[kind].stacks)
    made = registry.abstract_leaves(kind, cfg)
    assert {k: v.shape for k, v in fed.items()} == {k: v.shape for k, v in made.items()}
