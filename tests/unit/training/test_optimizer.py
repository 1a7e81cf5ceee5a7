"""Optimizers against optax, the state of each, and its sharding."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from framepack_jax import bundle
from framepack_jax.models import lora
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.parallel import sharding
from framepack_jax.training import optimizer, state
from framepack_jax.training.config import OptimizerConfig
from tests.fixtures.training_steps import BASE


def test_adam_in_8_bits_stays_near_adam() -> None:
    """The updates of both over many steps of noisy gradients of very different size."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 2, (4, 512))).astype(np.float32)
    mean = rng.standard_normal((4, 512)).astype(np.float32) * scale
    params = {"kernel": jnp.zeros((4, 512))}
    both = optax.scale_by_adam(0.9, 0.99, 1e-8), optimizer.scale_by_adam_8bit(0.9, 0.99, 1e-8)
    states, steps = [tx.init(params) for tx in both], [jax.jit(tx.update) for tx in both]
    for _ in range(40):
        grads = {"kernel": jnp.asarray(mean + scale * rng.standard_normal(mean.shape), jnp.float32)}
        out = []
        for i, update in enumerate(steps):
            updates, states[i] = update(grads, states[i])
            out.append(np.asarray(updates["kernel"]))
    error = np.sqrt(((out[1] - out[0]) ** 2).mean() / (out[0] ** 2).mean())
    assert error < 0.12
    assert states[1].mu["kernel"].codes.dtype == jnp.int8
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(states[1]))
    assert size < 2.1 * params["kernel"].size


def test_a_second_moment_never_vanishes() -> None:
    tx = optimizer.scale_by_adam_8bit(0.9, 0.99, 1e-8)
    grads = {"kernel": jnp.asarray([[1e4, 1e-6, 0.0]])}
    state_ = tx.init(grads)
    for _ in range(5):
        updates, state_ = tx.update(grads, state_)
    assert np.abs(updates["kernel"]).max() < 2 and updates["kernel"][0, 2] == 0


def test_moments_in_8_bits_shrink() -> None:
    """Also by less than the distance of two codes a step, which rounding would undo."""
    both = optax.scale_by_adam(0.9, 0.999, 1e-8), optimizer.scale_by_adam_8bit(0.9, 0.999, 1e-8)
    grads = {"kernel": jnp.asarray(np.exp(np.linspace(-3, 3, 64))[None], jnp.float32)}
    states, updates = [tx.init(grads) for tx in both], [jax.jit(tx.update) for tx in both]
    for i in range(400):
        now = grads if i < 20 else jax.tree.map(lambda g: 0.1 * g, grads)
        states = [update(now, state)[1] for update, state in zip(updates, states, strict=True)]
    found = optimizer._number(states[1].nu["kernel"], optimizer.SECOND)
    ratio = np.asarray(found / states[0].nu["kernel"])
    assert 0.85 < ratio.mean() < 1.15 and ratio.min() > 0.6 and ratio.max() < 1.6


def test_statistics_of_a_stack_are_of_its_layers() -> None:
    """Adafactor of a stack is adafactor of each layer."""
    inner = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=4), optax.clip_by_block_rms(1.0)
    )
    tx = optimizer.per_layer(inner, ("double",))
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((3, 8, 16)).astype(np.float32) * np.array([[[1]], [[50]], [[3]]])
    tree = {"double": {"kernel": jnp.asarray(grads)}, "head": {"kernel": jnp.asarray(grads[0])}}
    updates, _ = tx.update(tree, tx.init(tree), tree)
    for layer in range(3):
        alone = {"kernel": jnp.asarray(grads[layer])}
        expected, _ = inner.update(alone, inner.init(alone), alone)
        found = updates["double"]["kernel"][layer]
        np.testing.assert_allclose(found, expected["kernel"], rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["kernel"], updates["double"]["kernel"][0], rtol=1e-6)


def test_muon_of_matrices_is_that_of_optax() -> None:
    """`optax.contrib.muon` knows matrices alone: of each layer, of queries, keys and values each,
    and of a convolution with its taps among the inputs."""
    rng = np.random.default_rng(0)
    shapes = {
        ("double", "img_qkv", "kernel"): (2, 8, 3, 2, 6),
        ("double", "img_qkv", "lora_a"): (2, 8, 4),
        ("double", "img_qkv", "lora_b"): (2, 4, 3, 2, 6),
        ("double", "img_out", "kernel"): (2, 8, 6),
        ("double", "img_out", "bias"): (2, 6),
        ("double", "img_mod", "kernel"): (2, 8, 48),
        ("mid", "resnet_0", "conv1", "kernel"): (3, 3, 3, 4, 8),
        ("mid", "attention", "qkv", "kernel"): (8, 3, 1, 6),
        ("head", "out", "kernel"): (8, 8),
    }
    tx = optimizer.scale_by_muon(0.9, 0.99, 1e-8, ("double",))
    draws = [
        {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
        for _ in range(3)
    ]
    state_, update = tx.init(unflatten_dict(draws[0])), jax.jit(tx.update)
    for grads in draws:
        updates, state_ = update(unflatten_dict(grads), state_)
    found = flatten_dict(updates)

    def alone(matrices: list[np.ndarray], expected: optax.GradientTransformation) -> np.ndarray:
        state_ = expected.init({"kernel": matrices[0]})
        for matrix in matrices:
            updates, state_ = expected.update({"kernel": matrix}, state_, {"kernel": matrix})
        return -np.asarray(updates["kernel"])

    muon, adam = (
        optax.GradientTransformation(tx.init, jax.jit(tx.update))
        for tx in (
            optax.contrib.muon(1.0, beta=0.9, consistent_rms=0.2),
            optax.adam(1.0, 0.9, 0.99, 1e-8),
        )
    )

    def check(path: tuple[str, ...], at: Any, matrix: tuple[int, int] | None) -> None:
        taken = [grads[path][at] for grads in draws]
        if matrix is None:
            expected = alone(taken, adam)
        else:
            expected = alone([g.reshape(matrix) for g in taken], muon).reshape(taken[0].shape)
        np.testing.assert_allclose(found[path][at], expected, rtol=2e-4, atol=2e-5)

    for layer in range(2):
        for part in range(3):
            check(("double", "img_qkv", "kernel"), (layer, slice(None), part), (8, 12))
            check(("double", "img_qkv", "lora_b"), (layer, slice(None), part), (4, 12))
        check(("double", "img_qkv", "lora_a"), layer, (8, 4))
        check(("double", "img_out", "kernel"), layer, (8, 6))
        check(("double", "img_out", "bias"), layer, None)
        check(("double", "img_mod", "kernel"), layer, None)
    check(("mid", "resnet_0", "conv1", "kernel"), ..., (108, 8))
    for part in range(3):
        check(("mid", "attention", "qkv", "kernel"), (slice(None), part), (8, 6))
    check(("head", "out", "kernel"), ..., None)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adam8bit", "muon"])
def test_the_released_model_shards_with_its_optimizer(name) -> None:
    """At full size: every leaf of the state is divided as its parameter, less reduced axes."""
    cfg = dataclasses.replace(
        BASE, bundle="framepack_i2v", network={}, schedule=None, init="bundle",
        optimizer=OptimizerConfig(name=name),
    )  # fmt: skip
    manifest = bundle.read_manifest(bundle.resolve("framepack_i2v"))
    model = state.model_of(cfg, manifest)
    trained, _ = state.abstract_params(cfg, model)
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == 12_874_314_816
    specs = sharding.resolve((*TRANSFORMER.sharding_rules, *lora.SHARDINGS), trained)
    tx = optimizer.make(cfg.optimizer, TRANSFORMER.stacks)
    opt_state = jax.eval_shape(tx.init, trained)
    found = optimizer.state_specs(opt_state, trained, specs)
    bytes_, held = 0, 0
    sizes = {"data": 1, "fsdp": 8, "context": 1, "tensor": 2}
    for leaf, spec in zip(
        jax.tree.leaves(opt_state),
        jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)),
        strict=True,
    ):
        names = [n for axis in spec for n in ((axis,) if isinstance(axis, str) else axis or ())]
        ways = math.prod(sizes[name] for name in names)
        for size, axis in zip(leaf.shape, spec, strict=False):
            axes = (axis,) if isinstance(axis, str) else axis or ()
            assert size % math.prod(sizes[name] for name in axes) == 0
        bytes_ += leaf.size * leaf.dtype.itemsize
        held += leaf.size * leaf.dtype.itemsize / ways
    per_parameter = bytes_ / 12_874_314_816
    expected = {
        "adamw": (8, 8.01), "adam8bit": (2, 2.1), "adafactor": (0, 0.05), "muon": (4, 6),
    }  # fmt: skip
    assert expected[name][0] < per_parameter < expected[name][1]
    if name != "adafactor":
        assert held < bytes_ / 14


def test_state_of_no_parameter_is_named() -> None:
    spec = jax.sharding.PartitionSpec("fsdp", None)
    params = {"head": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}}
    specs = {"head": {"kernel": spec}}
    odd = {"mu": {"head": {"kernel": jax.ShapeDtypeStruct((5, 7), jnp.float32)}}}
    with pytest.raises(ValueError, match=r"mu/head/kernel is \(5, 7\)"):
        optimizer.state_specs(odd, params, specs)


def test_the_learning_rate_rises_and_falls() -> None:
    rate = optimizer.learning_rate(
        OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule="cosine"), 12
    )
    np.testing.assert_allclose([rate(i) for i in range(5)], [0.5, 1.0, 1.5, 2.0, 2.0])
    assert abs(float(rate(8)) - (0.2 + 0.9)) < 1e-6 and abs(float(rate(12)) - 0.2) < 1e-6
    constant = optimizer.learning_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=0), 12)
    assert float(constant(0)) == float(constant(11)) == 2.0


def test_weights_decay_and_biases_do_not() -> None:
    cfg = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup_steps=0)
    params = {"head": {"out": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}}
    tx = optimizer.make(cfg, ())
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, learning_rate=0.1)
    np.testing.assert_allclose(updates["head"]["out"]["kernel"], -0.05)
    np.testing.assert_array_equal(updates["head"]["out"]["bias"], 0)
