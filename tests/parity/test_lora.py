"""LoRA: beside the kernels, merged into them and in PEFT alike; files of every kind, in and out."""

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoFramepackPipeline, HunyuanVideoFramepackTransformer3DModel
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from framepack_jax.conversion import engine, lora_fusion, lora_peft, tables, weight_files
from framepack_jax.conversion import lora as files
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import lora, lora_layers, quantization, registry, scan
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.hunyuan.step_cache import block_input, first_block
from framepack_jax.models.lora import Factors
from framepack_jax.models.lora_layers import scale_factors
from framepack_jax.models.params import Params, merge_params, stack_layers, unstack_layers
from framepack_jax.models.quantization import cast_params
from framepack_jax.packing import PackedContext
from framepack_jax.parallel import sharding
from framepack_jax.training import state
from framepack_jax.training.config import LoRAConfig, TrainConfig
from tests.fixtures.comfyui import comfyui as renamed_by_comfyui
from tests.fixtures.torch_reference import convert_module, randomize, relative_error

PARITY = 2e-4
TIMES = {"k4": range(6, 22), "k2": (4, 5), "k1": (0,), "target": (1, 2)}
ROWS, COLUMNS, TEXT = 4, 6, 5
# The programs are tiny: making them fast takes longer than running them slowly.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
velocity = jax.jit(transformer.velocity, static_argnames=("cfg", "dtype"), compiler_options=QUICK)

Tensors = dict[str, np.ndarray]


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


@torch.no_grad()
def torch_velocity(module: torch.nn.Module, inputs: Tensors) -> np.ndarray:
    def video(name: str) -> torch.Tensor:
        return torch.from_numpy(rearrange(inputs[name], "b t h w c -> b c t h w").copy())

    out = module(
        video("target"), torch.tensor([700.0]), torch.from_numpy(inputs["text"]),
        torch.tensor([[1.0] * 4 + [0.0]]), torch.from_numpy(inputs["pooled"]),
        torch.from_numpy(inputs["image"]), torch.tensor(TIMES["target"]),
        guidance=torch.tensor([6000.0]),
        latents_clean=video("k1"), indices_latents_clean=torch.tensor(TIMES["k1"]),
        latents_history_2x=video("k2"), indices_latents_history_2x=torch.tensor(TIMES["k2"]),
        latents_history_4x=video("k4"),
        indices_latents_history_4x=torch.tensor(list(TIMES["k4"])), return_dict=False,
    )[0]  # fmt: skip
    return rearrange(out.numpy(), "b c t h w -> b t h w c")


def config_of(module: torch.nn.Module, **changes) -> LoraConfig:
    """Adapters on every layer that has a matrix; two sorts of layer have a rank of their own."""
    targets = [
        name
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear | torch.nn.Conv3d)
    ]
    fields = {
        "r": 4, "lora_alpha": 6, "target_modules": targets,
        "rank_pattern": {"attn.to_q": 3, r"^transformer_blocks.1.ff.net.2": 5},
        "alpha_pattern": {"attn.to_k": 2, r"^proj_out": 1},
    }  # fmt: skip
    return LoraConfig(**fields | changes)


def randomize_adapters(module: torch.nn.Module) -> torch.nn.Module:
    """PEFT begins with B = 0, with which an adapter changes nothing."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.5 * noise / np.sqrt(parameter[0].numel()))
    return module


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


def random_lora(cfg, seed: int, ranks=(1, 2, 3), share: float = 1.0) -> lora.LoRA:
    """Factors for a share of all kernels, of ranks that vary from kernel to kernel."""
    random = np.random.default_rng(seed)
    made = {}
    for path, leaf in registry.abstract_leaves("hunyuan_packed_dit", cfg).items():
        if path.endswith("/kernel") and random.random() < share:
            rank = int(random.choice(ranks))
            a = random.standard_normal((leaf.shape[0], rank), np.float32)
            b = random.standard_normal((rank, *leaf.shape[1:]), np.float32)
            made[path] = Factors(a / np.sqrt(len(a)).astype(np.float32), b, np.full(rank, 0.5))
    return made


def few(made: lora.LoRA, stack_name: str) -> lora.LoRA:
    """Those of one stack: merging compiles for every shape of kernel."""
    return {path: f for path, f in made.items() if path.startswith(stack_name)}


def changes(made: lora.LoRA) -> Tensors:
    """What each kernel is changed by."""
    return {p: np.tensordot(np.float64(f.a) * f.scale, f.b, 1) for p, f in made.items()}


def scaled_into_b(factors: Factors) -> Factors:
    b = lora.scaled(factors).astype(factors.b.dtype)
    return Factors(factors.a, b, np.ones_like(factors.scale))


def assert_same_lora(made: lora.LoRA, expected: lora.LoRA) -> None:
    assert made.keys() == expected.keys()
    for path, (a, b, scale) in expected.items():
        for ours, theirs in ((made[path].a, a), (made[path].b, b)):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs, err_msg=path)
        np.testing.assert_allclose(made[path].scale, scale, rtol=1e-7, err_msg=path)


# Computing


def test_beside_the_kernels_as_merged_as_in_peft(peft, module, model, arguments, inputs) -> None:
    cfg, params = model
    file, theirs = peft
    read = files.read(file, cfg)
    assert read.applied == read.modules == len(config_of(module).target_modules)
    assert read.ranks.keys() == {3, 4, 5} and read.unmatched == ()
    attached = lora.attach(params, read.lora)
    beside = velocity(cfg, attached, *arguments)
    merged = velocity(cfg, lora.merge(attached), *arguments)
    assert relative_error(beside, theirs) < PARITY
    assert relative_error(merged, theirs) < PARITY
    # The adapters matter.
    assert relative_error(velocity(cfg, params, *arguments), theirs) > 0.1
    assert jax.tree.structure(lora.merge(attached)) == jax.tree.structure(params)


def test_without_a_lora_nothing_is_added(model, arguments, monkeypatch) -> None:
    cfg, params = model

    def traced() -> str:
        compute = jax.jit(lambda p, *args: transformer.velocity(cfg, p, *args))
        return compute.lower(params, *arguments).as_text()

    as_it_is = traced()
    monkeypatch.setattr(lora_layers, "lora_interceptor", contextlib.nullcontext)
    assert traced() == as_it_is


def test_parts_of_the_pass_for_step_caches(model) -> None:
    """The loop over some of the layers, and the block input, compute with the adapters too."""
    cfg, params = model
    attached = lora.attach(params, few(random_lora(cfg, 1), "double"))
    random = np.random.default_rng(2)
    img, txt = (random.standard_normal((1, n, cfg.width), np.float32) for n in (6, 4))
    rope = transformer.rope_table(np.arange(1)[None, :], 2, 3, cfg.rope_axes, cfg.rope_theta)
    tokens = transformer.Tokens(img, txt, img[:, 0], rope, np.ones((1, 10), bool))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def parts(params):
        first = first_block(cfg, params, tokens)
        return block_input(cfg, params, tokens), first.img, first.txt

    ours, merged, plain = map(parts, (attached, lora.merge(attached), params))
    for part in range(len(ours)):
        assert relative_error(ours[part], merged[part]) < 1e-5
        assert relative_error(ours[part], plain[part]) > 0.1


class Projections(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(6, name="out")(nn.DenseGeneral((2, 3), name="heads")(x).reshape(4, 6))


class Bent(nn.Module):
    """A layer whose gradient reads what its projection gave."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.sin(nn.Dense(6, name="out")(x))


def test_a_gradient_keeps_the_sum_of_what_kernel_and_factors_give() -> None:
    x = jnp.zeros((4, 6))
    params = scan.init(Bent(), jax.random.key(0), 2, x)
    factors = Factors(np.zeros((6, 3), np.float32), np.zeros((3, 6), np.float32), np.ones(3))
    made = {f"stack/0{i}/out/kernel": factors for i in range(2)}
    attached = lora.attach({"stack": params}, made)["stack"]

    def kept(params: Params, remat: str) -> list[tuple[int, ...]]:
        def residuals(params: Params) -> Any:
            return jax.vjp(lambda p: scan.run(Bent(), p, x, remat=remat), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, params))
        return [leaf.shape for leaf in leaves if leaf.shape[:2] == (2, 4)]

    for some in (params, attached):
        assert kept(some, "full") == [(2, 4, 6)]  # inputs
        assert kept(some, "dots") == [(2, 4, 6)] * 2  # and results
    assert (2, 4, 3) in kept(attached, "none")


def test_factors_take_the_dtype_of_their_block() -> None:
    params = scan.init(Projections(), jax.random.key(0), 2, jnp.zeros((4, 6)))
    random = np.random.default_rng(0)
    made = {
        f"stack/0{i}/{name}/kernel": Factors(
            random.standard_normal((6, 1 + i), np.float32),
            random.standard_normal((1 + i, *outputs), np.float32),
            np.ones(1 + i),
        )
        for name, outputs in (("out", (6,)), ("heads", (2, 3)))
        for i in range(2)
    }
    attached = lora.attach({"stack": params}, made)["stack"]
    x = jnp.asarray(random.standard_normal((4, 6)), jnp.bfloat16)
    y = scan.run(Projections(), attached, x)
    exact = scan.run(Projections(), lora.merge({"stack": attached})["stack"], np.float32(x))
    assert y.dtype == jnp.bfloat16 and relative_error(y, exact) < 0.05
    text = str(jax.make_jaxpr(lambda p, x: scan.run(Projections(), p, x))(attached, x))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 6 and all(":bf16[" in line for line in products)


@pytest.mark.parametrize("dtype", quantization.QUANTIZED)
def test_beside_kernels_of_eight_bits(dtype) -> None:
    """What is added does not pass through the eight bits."""
    random = np.random.default_rng(1)
    kernel = random.integers(-127, 128, (2, 6, 6)).astype(dtype)
    scale = random.random((2, 6), np.float32)
    factors = Factors(*random.standard_normal((2, 6, 6), np.float32), np.ones(6))
    exact = kernel.astype(np.float32) * scale[:, None, :] + np.float32(
        [np.zeros((6, 6)), factors.a @ factors.b]
    )
    params = {"kernel": jnp.asarray(kernel), quantization.SCALE: jnp.asarray(scale)}
    attached = lora.attach({"s": {"out": params}}, {"s/01/out/kernel": factors})["s"]
    x = random.standard_normal((4, 6), np.float32)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(6, use_bias=False, name="out")(x)

    y = scan.run(Block(), attached, jnp.asarray(x))
    assert relative_error(y, x @ exact[0] @ exact[1]) < 1e-5
    # A kernel that could be merged comes first, and is kept.
    floating = lora.attach({"a": {"kernel": jnp.ones((6, 6))}}, {"a/kernel": factors})
    with pytest.raises(ValueError, match=f"without --dtype {dtype}, or leave --merge-lora out"):
        lora.merge(floating | {"s": attached}, donate=True)
    assert not floating["a"]["kernel"].is_deleted()


def test_the_head_multiplies_factors_as_it_does_kernels(model) -> None:
    cfg, params = model
    attached = lora.attach(params, random_lora(cfg, 2))
    tokens, vec = jnp.zeros((1, 6, cfg.width), jnp.bfloat16), jnp.zeros((1, cfg.width))
    trace = jax.make_jaxpr(lambda p: transformer.head(cfg, p, tokens, vec, (1, 1, 4, 6, 16)))
    (program,) = trace(attached).eqns
    inner = program.params["jaxpr"].eqns
    products = [e for e in inner if e.primitive.name == "dot_general"]
    assert len(products) == 6
    for product in products:
        assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}
        assert product.outvars[0].aval.dtype == jnp.float32


def test_several_with_weights_are_the_sum_of_their_changes(model) -> None:
    cfg, params = model
    one, two = random_lora(cfg, 3, share=0.7), random_lora(cfg, 4, (2, 5), share=0.5)
    one, two = few(one, "double"), few(two, "double")
    both = lora.combine([(one, 0.7), (two, -1.3)])
    assert {f.rank for f in both.values()} >= {1, 2, 3, 4, 5, 6}
    # Nothing is rounded yet.
    assert {s for f in both.values() for s in f.scale} == {0.35, -0.65}
    leaves = unstack_layers(jax.device_get(params), TRANSFORMER.stacks)
    for weight, made in ((0.7, one), (-1.3, two)):
        for path, change in changes(made).items():
            leaves[path] = leaves[path] + weight * change
    expected = stack_layers(leaves, TRANSFORMER.stacks, np.stack)
    attached = lora.attach(params, both)
    error = jax.tree.map(relative_error, lora.merge(attached), expected)
    assert max(jax.tree.leaves(error)) < 1e-6


def test_attached_factors_come_out_again(model) -> None:
    cfg, params = model
    made = random_lora(cfg, 6, share=0.6)
    out = lora.extract(lora.attach(params, made))
    assert out.keys() == made.keys()
    for path, change in changes(made).items():
        assert out[path].rank == made[path].rank
        np.testing.assert_allclose(changes(out)[path], change, rtol=1e-6, atol=1e-7)


def test_merging_in_place_uses_the_kernels_up(model) -> None:
    cfg, params = model
    own = jax.tree.map(jnp.copy, params)
    attached = lora.attach(own, few(random_lora(cfg, 7), "double"))
    expected = lora.merge(attached)
    merged = lora.merge(attached, donate=True)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    assert own["double"]["img_qkv"]["kernel"].is_deleted()
    assert not own["single"]["qkv"]["kernel"].is_deleted()


def test_merging_rounds_once(model) -> None:
    """Into bfloat16 kernels: the float32 sum, rounded."""
    cfg, params = model
    half = cast_params(params, jnp.bfloat16)
    made = few(random_lora(cfg, 8), "single")
    merged = lora.merge(lora.attach(half, made))["single"]["qkv"]["kernel"][1]
    change = made["single/01/qkv/kernel"]
    full = np.float32(half["single"]["qkv"]["kernel"][1]) + np.float32(
        np.tensordot(change.a, lora.scaled(change), 1)
    )
    error = np.abs(np.float32(merged) - full) / np.maximum(np.abs(full), 1e-3)
    assert merged.dtype == jnp.bfloat16 and error.max() < 2**-8


def test_what_does_not_fit_is_named_together(model) -> None:
    cfg, params = model
    made = random_lora(cfg, 10)
    wrong = made["single/01/qkv/kernel"]
    made["single/01/qkv/kernel"] = wrong._replace(a=wrong.a[1:])
    made["double/07/img_mod/kernel"] = made["double/01/img_mod/kernel"]
    made["embed/nothing/kernel"] = made["embed/patch/kernel"]
    with pytest.raises(ValueError, match=r"3 of .* kernels") as error:
        lora.attach(params, made)
    for path in ("single/01/qkv", "double/07/img_mod", "embed/nothing"):
        assert path in str(error.value)
    with pytest.raises(ValueError, match="have a LoRA already"):
        lora.attach(lora.attach(params, random_lora(cfg, 11)), {})


def test_on_a_mesh_by_its_rules(model) -> None:
    cfg, params = model
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    attached = lora.attach(params, random_lora(cfg, 12), mesh=mesh, dtype=jnp.bfloat16)
    leaf = attached["double"]["img_qkv"]["lora_b"]
    assert leaf.sharding == jax.NamedSharding(mesh, jax.P()) and leaf.dtype == jnp.bfloat16
    sharding.resolve([*TRANSFORMER.sharding_rules, *lora.SHARDINGS], attached)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)), ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("dir/x:y:-1", ("dir/x:y", -1.0)), ("c:/x", ("c:/x", 1.0)), ("x:.5", ("x", 0.5)),
        ("x:nan", ("x:nan", 1.0)),
    ],
)  # fmt: skip
def test_weight_of_a_flag(text: str, expected: tuple[str, float]) -> None:
    assert lora.parse_weight(text) == expected


def test_a_flag_without_a_file() -> None:
    with pytest.raises(ValueError, match="FILE:WEIGHT"):
        lora.parse_weight("")


# Files in


def plan_of(file: Path) -> engine.ConversionJob:
    source = tables.recognise(weight_files.open_checkpoint(file), "transformer")
    return engine.plan(dataclasses.replace(source, overrides={"rope_axes": (4, 6, 6)}))


@dataclasses.dataclass
class Original:
    """Tencent's toy network: config, its tensors, the leaves they become, and its matrices adapted
    at random, {module: (down, up, alpha)}."""

    cfg: TransformerConfig
    tensors: Tensors
    leaves: Tensors
    adapters: dict[str, tuple[np.ndarray, np.ndarray, float]]


@pytest.fixture(scope="module")
def original(golden) -> Original:
    plan = plan_of(golden / "hunyuan_original" / "mp_rank_00_model_states.pt")
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


def kohya(original: Original) -> Tensors:
    """By the rule of sd-scripts' `networks/lora.py`: lora_unet_ and the name with underscores."""
    tensors = {}
    for module, (down, up, alpha) in original.adapters.items():
        name = "lora_unet_" + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    return tensors


def dotted(original: Original) -> Tensors:
    """As diffusion-pipe writes them; alpha is multiplied in."""
    tensors = {}
    for module, (down, up, alpha) in original.adapters.items():
        scaled = up * np.float32(alpha / len(down))
        tensors[f"diffusion_model.{module}.lora_A.weight"] = down
        tensors[f"diffusion_model.{module}.lora_B.weight"] = scaled
    return tensors


def bare_with_alpha(original: Original) -> Tensors:
    tensors = {}
    for module, (down, up, alpha) in original.adapters.items():
        tensors[f"{module}.lora.down.weight"], tensors[f"{module}.lora.up.weight"] = down, up
        tensors[f"{module}.alpha"] = np.array([alpha], np.float32)
    return tensors


def comfyui(original: Original) -> Tensors:
    """As ComfyUI saves them: by the names of its own modules."""
    renamed = {"img_attn_qkv": "img_attn.qkv", "_mod.linear": "_mod.lin"}
    renamed |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "modulation.linear": "modulation.lin"}
    tensors = {}
    for name, tensor in dotted(original).items():
        if "double_blocks." in name or "single_blocks." in name:
            for theirs, ours in renamed.items():
                name = name.replace(theirs, ours)
        tensors[name] = tensor
    assert "diffusion_model.double_blocks.1.img_mlp.0.lora_A.weight" in tensors
    return tensors


@pytest.mark.golden
@pytest.mark.parametrize("spell", [kohya, dotted, bare_with_alpha, comfyui])
def test_tencent_names_change_what_they_say(spell, original, tmp_path) -> None:
    """Merging in Tencent's layout and converting is converting and merging here."""
    save_file(spell(original), tmp_path / "x.safetensors")
    read = files.read(tmp_path / "x.safetensors", original.cfg)
    assert read.applied == read.modules == len(original.adapters)
    assert "Tencent" in read.summary()
    adapted = {name: tensor.copy() for name, tensor in original.tensors.items()}
    for module, (down, up, alpha) in original.adapters.items():
        flat = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        change = (alpha / len(down) * flat).reshape(adapted[f"{module}.weight"].shape)
        adapted[f"{module}.weight"] += change
    save_file(adapted, tmp_path / "adapted.safetensors")
    theirs = dict(plan_of(tmp_path / "adapted.safetensors").leaves())
    ours = changes(read.lora)
    for path, leaf in theirs.items():
        change = leaf - original.leaves[path]
        assert path.endswith("/kernel") == (path in ours) == bool(change.any()), path
        if path in ours:
            assert relative_error(ours[path], change) < 1e-5, path


def pipeline_keys(tensors: Tensors) -> Tensors:
    return {f"transformer.{name}": x for name, x in tensors.items()}


def peft_keys(tensors: Tensors) -> Tensors:
    return {f"base_model.model.{name}": x for name, x in tensors.items()}


def default_adapter(tensors: Tensors) -> Tensors:
    return {re.sub(r"(lora_[AB])", r"\1.default", name): x for name, x in tensors.items()}


def musubi(tensors: Tensors) -> Tensors:
    """FramePack's LoRAs: diffusers' names by kohya's rule."""
    sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
    spelt = {}
    for name, x in tensors.items():
        module, side, _ = name.rsplit(".", 2)
        spelt[f"lora_unet_{module.replace('.', '_')}.{sides[side]}.weight"] = x
    return spelt


def onetrainer(tensors: Tensors) -> Tensors:
    """Its older files; as musubi's, of the diffusers pipeline's part."""
    return {
        name.replace("lora_unet_", "lora_transformer_"): x for name, x in musubi(tensors).items()
    }


def dots_for_underscores(tensors: Tensors) -> Tensors:
    """As musubi-tuner's converter spells FramePack's modules."""
    return {
        f"diffusion_model.{module.replace('_', '.')}.{factor}": x
        for name, x in tensors.items()
        for module, factor in [re.fullmatch(r"(.*)\.(lora_\w\.weight)", name).groups()]
    }


def half_of_the_dots(tensors: Tensors) -> Tensors:
    """As the wrapper of FramePack for ComfyUI mends such names."""
    return {
        name.replace("single.transformer.blocks", "single_transformer_blocks").replace(
            "to.out", "to_out"
        ): x
        for name, x in dots_for_underscores(tensors).items()
    }


def underscores_behind_prefixes(tensors: Tensors) -> Tensors:
    return {f"base_model.model.{name}": x for name, x in musubi(tensors).items()}


def behind(prefix: str, spell: Callable[[Tensors], Tensors] = dict) -> Callable:
    return lambda tensors: {f"{prefix}{name}": x for name, x in spell(tensors).items()}


SPELLINGS = [
    pipeline_keys, peft_keys, default_adapter, musubi, onetrainer,
    dots_for_underscores, half_of_the_dots, underscores_behind_prefixes,
    *(behind(f"{prefix}.") for prefix in ("net", "ema", "student", "a.b_c")), behind("lora_dit_"),
    behind("ema.", pipeline_keys), behind("unet.", musubi), behind("net._orig_mod."),
]  # fmt: skip


@pytest.mark.parametrize("spell", SPELLINGS)
def test_the_same_under_every_prefix(spell, peft, model, tmp_path) -> None:
    file, _ = peft
    tensors = load_file(file)
    save_file(tensors, tmp_path / "bare.safetensors")
    save_file(spell(tensors), tmp_path / "spelt.safetensors")
    bare, spelt = (files.read(tmp_path / f"{n}.safetensors", model[0]) for n in ("bare", "spelt"))
    assert_same_lora(spelt.lora, bare.lora)
    # Without any alpha it is the rank.
    assert {s for f in bare.lora.values() for s in f.scale} == {1.0}


def test_the_folder_of_peft(module, model, inputs, tmp_path) -> None:
    """`save_pretrained`: alpha in adapter_config.json, here by rank-stabilised LoRA."""
    config = config_of(module, use_rslora=True)
    adapted = randomize_adapters(get_peft_model(copy.deepcopy(module), config))
    adapted.save_pretrained(tmp_path)
    read = files.read(tmp_path, model[0])
    assert_same_lora(files.read(tmp_path / "adapter_model.safetensors", model[0]).lora, read.lora)
    np.testing.assert_allclose(read.lora["embed/time_in/kernel"].scale, 6 / 2)
    # The layers of to_q have rank 3, those of to_k an alpha of 2.
    scale = read.lora["double/01/img_qkv/kernel"].scale
    np.testing.assert_allclose(scale, [6 / 3**0.5] * 3 + [2 / 2] * 4 + [6 / 2] * 4)
    weights = adapted.merge_and_unload().state_dict()
    merged = lora.merge(lora.attach(model[1], read.lora))
    for name, path in (
        ("transformer_blocks.1.ff.net.2.weight", ("double", "img_mlp_out")),
        ("single_transformer_blocks.1.proj_mlp.weight", ("single", "mlp_in")),
    ):
        ours = merged[path[0]][path[1]]["kernel"][1]
        assert relative_error(ours.T, weights[name].numpy()) < 1e-6
    ours = merged["embed"]["context_k2"]["kernel"][16 * 5 + 3]
    theirs = weights["clean_x_embedder.proj_2x.weight"][:, 3, 0, 1, 1].numpy()
    assert relative_error(ours, theirs) < 1e-6


def test_parts_of_a_file_and_what_is_not_of_the_network(peft, model, tmp_path) -> None:
    file, _ = peft
    tensors = load_file(file)
    some = {n: x for n, x in tensors.items() if n.startswith("transformer_blocks.0.attn.to_v.")}
    for side in ("lora_A", "lora_B"):
        some[f"text_encoder.layers.0.q_proj.{side}.weight"] = np.ones((2, 2), np.float32)
    save_file(some, tmp_path / "x.safetensors")
    read = files.read(tmp_path / "x.safetensors", model[0])
    assert (read.applied, read.modules) == (1, 2)
    assert read.unmatched == ("text_encoder.layers.0.q_proj",)
    assert "1 of 2 modules" in read.summary() and "text_encoder" in read.summary()
    ((path, (a, b, _)),) = read.lora.items()
    assert path == "double/00/img_qkv/kernel" and a.shape == (16, 4)
    assert b[:, 2].any() and not b[:, :2].any()
    assert "50% of the LoRA does not apply: 1 of its 2 modules" in read.warning()
    for i in range(5):
        tensors[f"text_encoder.{i}.lora_A.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, tmp_path / "most.safetensors")
    assert files.read(tmp_path / "most.safetensors", model[0]).warning() is None


def test_one_prefix_is_taken_off_a_file(peft, model, tmp_path) -> None:
    """Not that of a text encoder, although some of its modules end as those of the network do."""
    bare = load_file(peft[0])
    tensors = behind("dit.")(bare)
    encoder = ["llm.0.proj_out", "llm.0.q_proj", "llm.0.k_proj", "llm.1.proj_out", "llm.1.q_proj"]
    for module, side in itertools.product(encoder, "AB"):
        tensors[f"{module}.lora_{side}.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    read = files.read(tmp_path / "x.safetensors", model[0])
    save_file(bare, tmp_path / "bare.safetensors")
    assert_same_lora(read.lora, files.read(tmp_path / "bare.safetensors", model[0]).lora)
    assert sorted(read.unmatched) == sorted(encoder)


# Files that are refused


def test_two_adapters_behind_prefixes(peft, model, tmp_path) -> None:
    tensors = load_file(peft[0])
    save_file(behind("net.")(tensors) | behind("ema.")(tensors), tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=r"'ema\.' and .* 'net\.'.*behind one prefix"):
        files.read(tmp_path / "x.safetensors", model[0])


def test_a_network_with_some_names_alike(model, tmp_path) -> None:
    """Stable Diffusion's blocks end in names of FramePack's."""
    block = ["proj_in", "proj_out", "transformer_blocks.0.ff.net.0.proj"]
    block += [f"transformer_blocks.0.attn{i}.to_{x}" for i in (1, 2) for x in "qkv"]
    names = [
        f"unet.down_blocks.{i}.attentions.0.{module}.lora_{side}.weight"
        for i, module, side in itertools.product(range(2), block, "AB")
    ]
    save_file({name: np.ones((2, 2), np.float32) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="none of its 18 modules is one of this network"):
        files.read(tmp_path / "x.safetensors", model[0])


def test_names_of_another_network(model, tmp_path) -> None:
    modules = [f"lora_unet_down_blocks_{i}_attn" for i in range(9)]
    names = [f"{module}.lora_{side}.weight" for module in modules for side in ("up", "down")]
    save_file({name: np.ones((2, 2), np.float32) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="none of its 9 modules") as error:
        files.read(tmp_path / "x.safetensors", model[0])
    said = str(error.value)
    assert "lora_unet_down_blocks_0_attn" in said and "and 5 more" in said
    assert "transformer_blocks.0.attn.to_q" in said and "double_blocks.0.img_attn_qkv" in said


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("lora_unet_double_blocks_0_img_mod_linear.dora_scale", "DoRA"),
        ("transformer_blocks.0.attn.to_q.lora_magnitude_vector", "DoRA"),
        ("lora_unet_x.hada_w1_a", "LoHa"), ("lora_unet_x.lokr_w2", "LoKr"),
        ("lora_unet_x.oft_blocks", "OFT"), ("lora_unet_x.lora_mid.weight", "LoCon"),
        ("proj_out.lora_B.bias", "biases"), ("diffusion_model.proj_out.diff", "differences"),
    ],
)  # fmt: skip
def test_other_kinds_of_adapter(tensor: str, kind: str, peft, model, tmp_path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(load_file(peft[0]) | {tensor: np.ones(1, np.float32)}, file)
    with pytest.raises(ConversionError, match=f"{kind}.*not supported") as error:
        files.read(file, model[0])
    assert tensor in str(error.value)
    assert files.is_lora(weight_files.open_checkpoint(file))


def test_what_is_wrong_is_named_together(peft, model, tmp_path) -> None:
    tensors = load_file(peft[0])
    block = "transformer_blocks.0.attn"
    del tensors[f"{block}.to_q.lora_A.weight"]
    tensors[f"{block}.to_k.lora_B.weight"] = np.ones((17, 4), np.float32)
    tensors[f"{block}.to_v.lora_A.weight"][1, 1] = np.nan
    tensors["norm_out.linear.alpha"] = np.ones(2, np.float32)
    large = "time_text_embed.timestep_embedder.linear_1"
    tensors[f"{large}.alpha"] = np.array(1e300)
    for side in ("A", "B"):
        again = f"proj_out.lora_{side}.weight"
        tensors[f"transformer.{again}"] = tensors[again]
    tensors[f"{block}.to_out.0.lora_A.weight"] = np.ones((0, 16), np.float32)
    tensors[f"{block}.to_out.0.lora_B.weight"] = np.ones((16, 0), np.float32)
    tensors["x_embedder.proj.lora_B.weight"] = np.ones((16, 4), np.int32)
    expected = [
        "to_q: it has .* but no down", r"to_k: its factors are \(4, 16\) and \(17, 4\), expected",
        "to_v.* NaN", r"alpha has shape \(2,\)", r"linear_1: alpha is 1e\+300, expected less",
        "proj_out is there twice",
        r"to_out.0: .*\(0, 16\)", "expected float32, bfloat16",
    ]  # fmt: skip
    said = []
    for keep in (block, "norm_out", "proj_out", "x_embedder", large):
        save_file({n: x for n, x in tensors.items() if keep in n}, tmp_path / "x.safetensors")
        with pytest.raises(ConversionError, match="does not fit the network") as error:
            files.read(tmp_path / "x.safetensors", model[0])
        said.append(str(error.value))
    for pattern in expected:
        assert any(re.search(pattern, text) for text in said), pattern


def test_one_adapter_a_file(model, tmp_path) -> None:
    names = ["proj_out.lora_A.one.weight", "proj_out.lora_A.two.weight"]
    save_file({name: np.ones((2, 16), np.float32) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="a single adapter"):
        files.read(tmp_path / "x.safetensors", model[0])


def test_no_lora_at_all(module, model, tmp_path) -> None:
    module.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="is not a LoRA") as error:
        files.read(tmp_path, model[0])
    assert "lora_down" in str(error.value)
    assert not files.is_lora(weight_files.open_checkpoint(tmp_path))
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ConversionError, match=r"cut\.safetensors"):
        files.read(tmp_path / "cut.safetensors", model[0])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "use_dora = True"), ({"bias": "all"}, "bias = 'all'"),
        ({"peft_type": "LOKR"}, "LOKR"), ({"init_lora_weights": "pissa_niter_4"}, "base weights"),
        ({"lora_alpha": "8"}, "for an alpha"), ({"lora_alpha": 10**400}, "for an alpha"),
        ({"alpha_pattern": [3]}, "for an alpha"), ({"alpha_pattern": {"x": None}}, "for an alpha"),
        ({"alpha_pattern": {"(a+)+": 3}}, "regular expression"),
    ],
)  # fmt: skip
def test_settings_that_mean_more(fields: dict, said: str, peft, model, tmp_path) -> None:
    metadata = {lora_peft.METADATA: json.dumps({f"transformer.{k}": v for k, v in fields.items()})}
    save_file(load_file(peft[0]), tmp_path / "x.safetensors", metadata)
    with pytest.raises(ConversionError, match=said):
        files.read(tmp_path / "x.safetensors", model[0])


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_damaged_settings(text: str, peft, model, tmp_path) -> None:
    save_file(load_file(peft[0]), tmp_path / "x.safetensors", {lora_peft.METADATA: text})
    with pytest.raises(ConversionError, match=r"is not (valid JSON|a JSON object)"):
        files.read(tmp_path / "x.safetensors", model[0])


def test_mutated_files_are_read_or_refused(peft, model, tmp_path) -> None:
    """Nothing but ConversionError, whatever bits of names, shapes, settings or numbers change."""
    tensors = {n: x for n, x in load_file(peft[0]).items() if ".attn.to_" in n and "1" in n}
    tensors["transformer_blocks.1.attn.to_q.alpha"] = np.float32([3])
    settings = {"lora_alpha": 4, "alpha_pattern": {"^proj_out": 2}}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, {lora_peft.METADATA: json.dumps(settings)})
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    random, outcomes = np.random.default_rng(3), collections.Counter()
    for _ in range(300):
        mutated = bytearray(whole)
        for position in random.integers(0, random.choice([8, header, len(whole)]), 3):
            mutated[position] = random.choice(list(b'"0[]{}:,.Aaf_\x00\xff'))
        file.write_bytes(mutated[: random.choice([len(whole)] * 4 + [header // 2])])
        try:
            read = files.read(file, model[0])
            outcomes["read"] += 1
            assert all(np.isfinite(x).all() for f in read.lora.values() for x in f)
        except ConversionError:
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 10, outcomes


# Files out


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
    factors = state.init_lora(run.lora, params, jax.random.key(0))
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
    for module, theirs in renamed_by_comfyui({name: name for name in original.tensors}).items():
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
@pytest.mark.parametrize("naming", files.NAMINGS)
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
    if files.NAMINGS[naming].alpha is None:
        made = {path: scaled_into_b(factors) for path, factors in made.items()}
    assert_same_lora(read, made)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("naming", files.NAMINGS)
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
    spelling = files.NAMINGS[naming]
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
    """What is given, and what the file that was converted has; hashes of its tensors do not hold
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


@pytest.mark.parametrize("naming", files.NAMINGS)
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
