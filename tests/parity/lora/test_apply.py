"""LoRA factors beside kernels and merged into them, compared with PEFT."""

import contextlib
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax.conversion import lora as files
from framepack_jax.models import lora, lora_layers, quantization, scan
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.hunyuan.step_cache_hooks import block_input, first_block
from framepack_jax.models.lora import Factors
from framepack_jax.models.params import Params, stack_layers, unstack_layers
from framepack_jax.models.quantization import cast_params
from framepack_jax.parallel import sharding
from tests.fixtures.lora import PARITY, QUICK, changes, config_of, few, random_lora, velocity
from tests.fixtures.torch_reference import relative_error

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch


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
    """Adapters are not rounded to eight bits."""
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
