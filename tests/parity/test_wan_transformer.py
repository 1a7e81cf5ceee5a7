"""Wan's transformer, with and without packed context, against goldens and live diffusers."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import HeliosTransformer3DModel, WanTransformer3DModel
from einops import rearrange
from safetensors.numpy import load_file

from framepack_jax.conversion import engine, tables, weight_files
from framepack_jax.models import registry
from framepack_jax.models.offload import OffloadedLayers
from framepack_jax.models.params import stack_layers, unstack_layers
from framepack_jax.models.wan import transformer
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.models.wan.spec import TRANSFORMER
from framepack_jax.models.wan.transformer import Conditions
from framepack_jax.packing import PackedContext, parse
from tests.fixtures.checkpoints import abstract_checkpoint, assert_same, write
from tests.fixtures.paths import GOLDEN
from tests.fixtures.torch_reference import convert_module, randomize, relative_error

velocity = jax.jit(transformer.velocity, static_argnames=("cfg", "dtype"))
GROUPS = {"k4": "long", "k2": "mid", "k1": "short"}
HELIOS = "f1k1_x_f16k4f2k2f1k1_g9"
SMALL = {
    "num_attention_heads": 3, "attention_head_dim": 12, "text_dim": 20, "freq_dim": 16,
    "ffn_dim": 28, "num_layers": 2,
}  # fmt: skip
MODULES = {
    "helios": lambda: HeliosTransformer3DModel(**SMALL, rope_dim=(4, 4, 4)),
    "variant": lambda: HeliosTransformer3DModel(
        **SMALL, rope_dim=(4, 4, 4), zero_history_timestep=False, guidance_cross_attn=False,
        is_amplify_history=True, history_scale_mode="scalar",
    ),
    "wan": lambda: WanTransformer3DModel(**SMALL),
}  # fmt: skip
# diffusers' names, and those of the original release.
ORIGINAL_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn1.to_", "self_attn."),
    ("attn1.", "self_attn."),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn2.to_", "cross_attn."),
    ("attn2.", "cross_attn."),
    ("norm2.", "norm3."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("proj_out", "head.head"),
)


def channels_last(x: np.ndarray) -> np.ndarray:
    return rearrange(x, "b c t h w -> b t h w c")


def convert(folder: Path):
    job = engine.make_job(tables.recognise(weight_files.open_checkpoint(folder), "transformer"))
    return job.cfg, stack_layers(dict(job.leaves()), TRANSFORMER.stacks)


def arguments(cfg: WanConfig, tensors: dict[str, np.ndarray]) -> tuple:
    """Ours from diffusers': (x, sigma, context, conditions)."""
    kernels = tuple(GROUPS) if cfg.context_kernels else ()
    x = channels_last(tensors["x"])
    target = tensors["indices_hidden_states"] if kernels else np.tile(np.arange(x.shape[1]), (2, 1))
    context = PackedContext(
        tuple(channels_last(tensors[f"latents_history_{GROUPS[k]}"]) for k in kernels),
        tuple(tensors[f"indices_latents_history_{GROUPS[k]}"] for k in kernels),
        target,
        kernels,
    )
    return x, tensors["timestep"] / 1000, context, Conditions(tensors["text"])


def draw(rows: int, columns: int, text_dim: int) -> dict[str, np.ndarray]:
    """Random inputs of a batch of 2, as diffusers takes them."""
    random = np.random.default_rng(0)

    def normal(*sizes: int) -> np.ndarray:
        return random.standard_normal(sizes, np.float32)

    lengths = {"short": (0, 19), "mid": (17, 18), "long": range(1, 17)}
    tensors = {"x": normal(2, 16, 3, rows, columns), "text": normal(2, 7, text_dim)}
    tensors["timestep"] = np.array([311.5, 902.25], np.float32)
    tensors["indices_hidden_states"] = np.array([[20, 21, 22], [35, 36, 37]], np.float32)
    for name, indices in lengths.items():
        tensors[f"latents_history_{name}"] = normal(2, 16, len(indices), rows, columns)
        tensors[f"indices_latents_history_{name}"] = np.array([indices, indices], np.float32)
    return tensors


@pytest.mark.golden
@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("pipeline/transformer", "helios"),
        ("transformer_variant", "helios_variant"),
        ("wan_transformer", "wan"),
    ],
)
def test_golden_forward(folder: str, expected: str) -> None:
    recorded = load_file(GOLDEN / "helios" / "reference.safetensors")
    prefix = "forward/"
    tensors = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
    cfg, params = convert(GOLDEN / "helios" / folder)
    out = velocity(cfg, params, *arguments(cfg, tensors))
    assert relative_error(out, channels_last(tensors[expected])) < 2e-4


@pytest.fixture(scope="module", params=MODULES)
def network(request, tmp_path_factory):
    """(module, config, parameters, inputs of diffusers, its output, channels last)."""
    module = randomize(MODULES[request.param](), seed=1)
    cfg, params = convert_module(module, "transformer", tmp_path_factory.mktemp("dit"))
    # Rows and columns that no context kernel divides.
    tensors = draw(6, 10, cfg.text_dim)
    given = {k: torch.from_numpy(v) for k, v in tensors.items()}
    first = {name: given.pop(name) for name in ("x", "timestep", "text")}
    history = given if cfg.context_kernels else {}
    with torch.no_grad():
        [out] = module(*first.values(), **history, return_dict=False)
    return module, cfg, params, tensors, channels_last(out.numpy())


def test_live_forward(network) -> None:
    _, cfg, params, tensors, expected = network
    assert relative_error(velocity(cfg, params, *arguments(cfg, tensors)), expected) < 1e-5


def test_bfloat16_is_close_and_ends_in_float32(network) -> None:
    _, cfg, params, tensors, expected = network
    out = velocity(cfg, params, *arguments(cfg, tensors), dtype=jnp.bfloat16)
    assert out.dtype == jnp.float32
    assert 1e-4 < relative_error(out, expected) < 0.05


def test_offloaded_layers_compute_the_same(network) -> None:
    _, cfg, params, tensors, _ = network
    layers = [jax.tree.map(lambda p, i=i: p[i], params["blocks"]) for i in range(cfg.layers)]
    offloaded = params | {"blocks": OffloadedLayers(layers)}
    given = arguments(cfg, tensors)
    whole = transformer.velocity(cfg, params, *given)
    # Layers that are programs of their own round in another order.
    assert relative_error(transformer.velocity(cfg, offloaded, *given), whole) < 2e-6


@pytest.mark.parametrize("network", ["helios"], indirect=True)
def test_rematerialized_gradients_are_the_same(network) -> None:
    _, cfg, params, tensors, _ = network
    given = arguments(cfg, tensors)

    def gradient(remat: str):
        return jax.grad(lambda p: jnp.mean(transformer.velocity(cfg, p, *given, remat=remat) ** 2))(
            params
        )

    plain, kept = map(jax.tree.leaves, (gradient("none"), gradient("full")))
    for ours, theirs in zip(kept, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("network", ["wan"], indirect=True)
def test_original_names_hold_the_same_weights(network, tmp_path) -> None:
    module, cfg, params, _, _ = network
    names = {}
    for name in module.state_dict():
        new = re.sub(r"(^|\.)scale_shift_table$", r"\1modulation", name)
        new = "head.modulation" if new == "modulation" else new
        for theirs, original in ORIGINAL_NAMES:
            new = new.replace(theirs, original)
        names[name] = new
    state = {names[name]: tensor for name, tensor in module.state_dict().items()}
    (tmp_path / "config.json").write_text(
        '{"model_type": "t2v", "dim": 36, "num_heads": 3, "num_layers": 2, "ffn_dim": 28,'
        ' "freq_dim": 16, "in_dim": 16, "out_dim": 16, "eps": 1e-6, "text_dim": 20}'
    )
    for prefix in ("", "model.diffusion_model."):
        file = write(state, tmp_path / f"wan{len(prefix)}.safetensors", prefix)
        checkpoint = weight_files.open_checkpoint(file)
        job = engine.make_job(tables.recognise(checkpoint, "transformer"))
        assert job.cfg == dataclasses.replace(cfg, text_dim=20)
        assert_same(dict(job.leaves()), unstack_layers(params, TRANSFORMER.stacks))


@pytest.mark.parametrize(
    ("model", "kind", "count"),
    [
        (HeliosTransformer3DModel, "helios", 14_312_427_584),
        (WanTransformer3DModel, "wan", 14_288_491_584),
    ],
)
def test_full_size(model, kind: str, count: int, tmp_path) -> None:
    """Every tensor of the released models has its place; counts are those of the originals."""
    with torch.device("meta"):
        module = model()
    assert count == sum(p.numel() for p in module.parameters())
    checkpoint = abstract_checkpoint(module.state_dict(), tmp_path)
    job = engine.make_job(tables.recognise(checkpoint, "transformer"))
    released = WanConfig()
    if kind == "helios":
        released = dataclasses.replace(
            released, context_kernels=("k1", "k2", "k4"), clean_context=True, prompt_to_target=True
        )
    assert job.cfg == released
    assert registry.parameter_count("wan_packed_dit", job.cfg) == count
    assert TRANSFORMER.context_kernels(parse(HELIOS)) == ("k1", "k2", "k4")
