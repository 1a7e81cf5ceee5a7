"""Wan's transformer, with and without packed context, against goldens and live diffusers."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import HeliosTransformer3DModel, WanTransformer3DModel
from safetensors.numpy import load_file

from framepack_jax.conversion import engine, tables, weight_files
from framepack_jax.models import registry
from framepack_jax.models.offload import OffloadedLayers
from framepack_jax.models.params import stack_layers, unstack_layers
from framepack_jax.models.wan import transformer
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.models.wan.spec import TRANSFORMER
from framepack_jax.packing import parse
from tests.fixtures.checkpoints import abstract_checkpoint, assert_same, write
from tests.fixtures.paths import GOLDEN
from tests.fixtures.torch_reference import convert_module, randomize, relative_error
from tests.fixtures.wan_networks import (
    MODULES,
    RELEASE_CONFIG,
    arguments,
    channels_last,
    draw,
    original_names,
    torch_velocity,
)

velocity = jax.jit(transformer.velocity, static_argnames=("cfg", "dtype"))
HELIOS = "f1k1_x_f16k4f2k2f1k1_g9"


def convert(folder: Path):
    job = engine.make_job(tables.recognise(weight_files.open_checkpoint(folder), "transformer"))
    return job.cfg, stack_layers(dict(job.leaves()), TRANSFORMER.stacks)


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
    return module, cfg, params, tensors, torch_velocity(module, tensors)


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
    state = original_names(module.state_dict())
    (tmp_path / "config.json").write_text(RELEASE_CONFIG)
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
