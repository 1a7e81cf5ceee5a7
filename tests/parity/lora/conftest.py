"""A small transformer, its inputs, and its adapters by PEFT."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel

from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.packing import PackedContext
from tests.fixtures.checkpoints import AXES, plan_of
from tests.fixtures.lora import (
    COLUMNS,
    ROWS,
    TEXT,
    TIMES,
    Original,
    Tensors,
    config_of,
    randomize_adapters,
    torch_velocity,
)
from tests.fixtures.torch_reference import convert_module, randomize


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    return randomize(
        HunyuanVideoFramepackTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, num_single_layers=2,
            num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=12, pooled_projection_dim=10,
            rope_axes_dim=(2, 2, 4), image_proj_dim=6, has_image_proj=True,
            has_clean_x_embedder=True,
        ),
        seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(module, tmp_path_factory):
    """(config, parameters) of the network without a LoRA."""
    return convert_module(module, "transformer", tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def inputs() -> Tensors:
    random = np.random.default_rng(0)
    shapes = {k: (1, len(times), ROWS, COLUMNS, 16) for k, times in TIMES.items()}
    shapes |= {"text": (1, TEXT, 12), "pooled": (1, 10), "image": (1, 3, 6)}
    return {k: random.standard_normal(shape, dtype=np.float32) for k, shape in shapes.items()}


@pytest.fixture(scope="module")
def arguments(inputs):
    """(x, sigma, context, conditions)."""
    kernels = ("k4", "k2", "k1")
    indices = {k: np.array([times], np.int32) for k, times in TIMES.items()}
    context = PackedContext(
        tuple(inputs[k] for k in kernels), tuple(indices[k] for k in kernels), indices["target"],
        kernels,
    )  # fmt: skip
    conditions = Conditions(
        inputs["text"], np.arange(TEXT)[None, :] < 4, inputs["pooled"], inputs["image"],
        np.array([6.0], np.float32),
    )  # fmt: skip
    return inputs["target"], np.array([0.7], np.float32), context, conditions


@pytest.fixture(scope="module")
def peft(module, inputs, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """(what diffusers saves of adapters on all layers, the velocity of the adapted network)."""
    adapted = copy.deepcopy(module)
    adapted.add_adapter(config_of(module))
    randomize_adapters(adapted)
    folder = tmp_path_factory.mktemp("peft")
    adapted.save_lora_adapter(folder)
    (file,) = folder.iterdir()
    return file, torch_velocity(adapted, inputs)


@pytest.fixture(scope="module")
def original(golden) -> Original:
    plan = plan_of(golden / "hunyuan_original" / "mp_rank_00_model_states.pt", **AXES)
    names = plan.source.checkpoint.names()
    tensors = {name: np.array(plan.source.checkpoint.read(name)) for name in names}
    random = np.random.default_rng(1)
    adapters = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.ndim > 1:
            rank = int(random.integers(1, 5))
            down = random.standard_normal((rank, *tensor.shape[1:]), np.float32)
            up = random.standard_normal((len(tensor), rank, *[1] * (tensor.ndim - 2)), np.float32)
            adapters[name.removesuffix(".weight")] = down, up, float(random.integers(1, 9))
    assert len(adapters) > 40
    return Original(plan.cfg, tensors, dict(plan.leaves()), adapters)
