"""One step of training, its optimizers and its state."""

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from framepack_jax import bundle, packing
from framepack_jax.data.config import DataConfig as Data
from framepack_jax.data.loader import open_loader
from framepack_jax.diffusion import flow
from framepack_jax.models import lora, lora_layers, quantization, scan
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.lora_layers import scale_factors
from framepack_jax.models.params import merge_params
from framepack_jax.parallel import sharding
from framepack_jax.training import (
    flow_matching,
    flow_matching_task,
    metrics,
    optimizer,
    state,
    summary,
    train_step,
    validation,
)
from framepack_jax.training.config import (
    CheckpointConfig,
    LoRAConfig,
    NoiseSchedule,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from framepack_jax.training.flow_matching_task import FlowMatchingTask, Networks
from framepack_jax.training.initial_weights import load_network
from framepack_jax.training.prefetch import local_share, place
from framepack_jax.training.task import Cost, StepMetrics
from tests.fixtures.compiling import QUICK, quick_flags
from tests.fixtures.paths import ROOT
from tests.fixtures.torch_reference import relative_error
from tests.fixtures.training_data import write_dataset

SCHEDULE = "f1k1_x_g2_f1k1f2k2f16k4_td"
BASE = TrainConfig(
    bundle="random", output="run", schedule=SCHEDULE, init="runs/base", batch=4, dtype="float32",
    network={"double_layers": 2, "single_layers": 3, "refiner_layers": 1}, remat="none",
    lora=LoRAConfig(rank=3, alpha=6.0),
)  # fmt: skip
RATE = np.float32(1e-2)


@functools.cache
def train_of(cfg: TrainConfig):
    """The compiled step of (state, frozen, batch, learning rate), which donates nothing."""
    return jax.jit(functools.partial(train_step.train_step, set_up(cfg)), compiler_options=QUICK)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, {(32, 48): (7, 9, 5, 5, 7)})
    loader = open_loader(Data(path=str(folder)), packing.parse(SCHEDULE), BASE.batch)
    return list(itertools.islice(loader, 4))


@functools.cache
def network():
    """Random parameters of the whole network, for all tests."""
    setup = set_up(BASE)
    key = jax.random.key(0)
    init = jax.jit(lambda: setup.model.spec.init(setup.model.cfg, key), compiler_options=QUICK)
    return init()


@functools.cache
def begun_once(cfg: TrainConfig):
    setup = set_up(cfg)
    return state.init_state(cfg, setup.model, setup.tx, setup.mesh, network())


@functools.cache
def set_up(cfg: TrainConfig) -> FlowMatchingTask:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return flow_matching_task.set_up(cfg, bundle.read_manifest(bundle.resolve("random")), mesh)


def begin(cfg: TrainConfig):
    """(setup, state, frozen parameters)."""
    setup = set_up(cfg)
    return setup, *begun_once(cfg)


def values(cfg: TrainConfig, batch, params, frozen) -> float:
    """The loss alone."""
    setup = set_up(cfg)
    keys = flow_matching.sample_keys(jax.random.key(cfg.seed), batch.meta.element)
    sigmas = jnp.asarray([0.1, 0.4, 0.7, 1.0])

    def compute(params, frozen):
        return setup.losses(setup.merge(params, Networks(frozen, {})), batch, keys, sigmas)

    losses = jax.jit(compute, compiler_options=QUICK)(params, frozen)
    return float(losses.mean())


def changed(**fields) -> TrainConfig:
    return dataclasses.replace(BASE, **fields)


# A dict in a frozen config cannot be hashed for the cache above.
TrainConfig.__hash__ = lambda self: hash(repr(self))


def on(setup, batch):
    return place(batch, setup.mesh, BASE.batch)


def gradient(cfg: TrainConfig, batch, params=None):
    """Loss and gradient of the trained parameters."""
    setup, begun, frozen = begin(cfg)
    keys = flow_matching.sample_keys(jax.random.key(cfg.seed), batch.meta.element)
    sigmas = flow_matching.draw_sigmas(cfg.noise_schedule, keys, 0.7)

    def loss(params):
        losses = setup.losses(setup.merge(params, Networks(frozen, {})), batch, keys, sigmas)
        return jnp.mean(losses)

    compute = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    return compute(begun.params if params is None else params)


def largest_difference(a, b) -> float:
    return max(
        relative_error(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        if np.abs(y).max() > 1e-8
    )


def perturbed(params, key=0):
    """Parameters none of which is zero."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.mark.parametrize("remat", [name for name in scan.REMAT if name != "none"])
def test_what_is_kept_does_not_change_the_gradient(batches, remat) -> None:
    expected = gradient(BASE, batches[0])
    found = gradient(changed(remat=remat), batches[0])
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("named, fields", [
    ("--remat some: expected one of none, dots, attention, full, offload", {"remat": "some"}),
    ("--trainable LoRA: expected one of all, context, lora", {"trainable": "LoRA"}),
    ("--optimizer.name adam: expected one of adamw", {"optimizer": OptimizerConfig(name="adam")}),
    ("--data.sections rand: expected one of", {"data": Data(sections="rand")}),
    ("--seed -1", {"seed": -1}),
    ("--validation.sigmas ()", {"validation": ValidationConfig(sigmas=())}),
])  # fmt: skip
def test_what_a_configuration_cannot_say_is_named(named, fields) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        changed(**fields)


def test_parts_of_a_batch_make_the_same_step(batches) -> None:
    results = []
    for parts in (1, 2, 4):
        setup, begun, frozen = begin(changed(grad_accum_steps=parts))
        new, metrics = train_of(setup.cfg)(begun, Networks(frozen, {}), on(setup, batches[0]), RATE)
        results.append((new.params, metrics.figures["losses"], metrics.figures["sigmas"]))
    for other in results[1:]:
        np.testing.assert_allclose(other[1], results[0][1], rtol=2e-5)
        np.testing.assert_allclose(other[2], results[0][2], rtol=1e-6)
        # The first step of Adam is the sign of the gradient where that is large.
        assert largest_difference(other[0], results[0][0]) < 1e-3


def test_the_loss_is_that_of_the_velocity(batches) -> None:
    """Against the formula, with the network that sampling calls."""
    setup, begun, frozen = begin(BASE)
    batch = batches[0]
    keys = flow_matching.sample_keys(jax.random.key(BASE.seed), batch.meta.element)
    sigmas = jnp.asarray([0.1, 0.4, 0.7, 1.0])
    compute = jax.jit(setup.losses, compiler_options=QUICK)
    found = compute(setup.merge(begun.params, Networks(frozen, {})), batch, keys, sigmas)
    noise = np.stack(
        [
            jax.random.normal(jax.random.fold_in(key, 0), batch.target.shape[1:]) for key in keys
        ]
    )  # fmt: skip
    x = np.asarray(batch.target, np.float32)
    sigma = np.asarray(sigmas)[:, None, None, None, None]
    given = batch.conditions
    conditions = Conditions(given.text, given.text_valid, given.pooled, given.image, jnp.ones(4))
    denoise = functools.partial(transformer.velocity, setup.model.cfg)
    velocity = jax.jit(denoise, compiler_options=QUICK)(
        begun.params, (1 - sigma) * x + sigma * noise, sigmas,
        jax.tree.map(jnp.asarray, batch.context), conditions,
    )  # fmt: skip
    expected = np.mean((np.asarray(velocity) - (noise - x)) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_noise_levels_are_shifted_as_in_sampling() -> None:
    keys = flow_matching.sample_keys(jax.random.key(3), jnp.arange(20_000))
    mu = 0.9
    uniform = flow_matching.draw_sigmas(NoiseSchedule("uniform"), keys, mu)
    # Quantiles of the uniform t are those of the sampler's grid.
    grid = flow.sigmas(4, mu)[::-1]
    np.testing.assert_allclose(np.quantile(uniform, [0.25, 0.5, 0.75]), grid[1:4], atol=0.01)
    normal = flow_matching.draw_sigmas(NoiseSchedule(mean=0.3, std=0.8, shift=0.0), keys, mu)
    logits = np.log(normal) - np.log1p(-np.asarray(normal))
    assert abs(logits.mean() - 0.3) < 0.02 and abs(logits.std() - 0.8) < 0.02
    assert len(np.unique(uniform)) > 19_000


def test_the_shift_is_that_of_the_section(batches) -> None:

    rows, columns = batches[0].target.shape[2:4]
    expected = flow.shift_mu(packing.target_tokens(packing.parse(SCHEDULE), rows, columns))
    assert flow_matching.section_mu(batches[0].target.shape) == expected


def test_history_noise_leaves_what_is_missing(batches) -> None:
    context = jax.tree.map(jnp.asarray, batches[0].context)
    keys = flow_matching.sample_keys(jax.random.key(0), jnp.asarray(batches[0].meta.element))
    moved = flow_matching.noised_context(context, keys, 0.5)
    missing = 0
    for old, new in zip(context.latents, moved.latents, strict=True):
        there = np.asarray(old != 0).any(axis=(2, 3, 4))
        changed_frames = np.asarray(old != new).any(axis=(2, 3, 4))
        assert (there == changed_frames).all() and new.dtype == old.dtype
        missing += (~there).sum()
    assert missing > 0


def test_a_moving_average_follows_by_hand(batches) -> None:
    setup, now, frozen = begin(changed(ema=0.75))
    train = train_of(setup.cfg)
    average = jax.tree.map(np.asarray, now.params)
    for batch in batches:
        now, _ = train(now, Networks(frozen, {}), on(setup, batch), RATE)
        average = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * np.asarray(p), average, now.params)
    assert largest_difference(now.ema, average) < 1e-6
    assert largest_difference(now.ema, now.params) > 1e-3


def test_a_step_that_is_not_finite_is_left_out(batches) -> None:
    setup, now, frozen = begin(changed(ema=0.9))
    train = train_of(setup.cfg)
    bad = batches[0].replace(target=np.full_like(batches[0].target, np.nan))
    now, metrics = train(now, Networks(frozen, {}), on(setup, batches[0]), RATE)
    assert not metrics.skipped
    before = jax.device_get(now)
    for count in (1, 2):
        now, metrics = train(now, Networks(frozen, {}), on(setup, bad), RATE)
        assert metrics.skipped and int(now.skipped_in_a_row) == count
    after = jax.device_get(now)
    for name in ("params", "opt_state", "ema"):
        pairs = zip(
            jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)),
            strict=True,
        )  # fmt: skip
        assert all(np.array_equal(a, b) for a, b in pairs)
    now, metrics = train(now, Networks(frozen, {}), on(setup, batches[1]), RATE)
    assert not metrics.skipped and int(now.skipped) == 2 and int(now.skipped_in_a_row) == 0
    assert int(now.step) == 4


def test_adapters_merged_are_adapters_applied(batches) -> None:
    """And what is exported and attached again computes what was trained."""
    cfg = changed(trainable="lora")
    _, begun, frozen = begin(cfg)
    params = perturbed(begun.params)
    applied = values(cfg, batches[0], params, frozen)
    merged = lora.merge(merge_params(scale_factors(params, state.factor_scale(cfg)), frozen))
    assert not any(
        path[-1] in (lora_layers.LORA_A, lora_layers.LORA_B) for path in flatten_dict(merged)
    )
    assert abs(applied - values(BASE, batches[0], merged, {})) < 1e-5 * applied
    assert abs(applied - values(BASE, batches[0], frozen, {})) > 1e-3
    attached = lora.attach(frozen, state.to_lora(cfg, params))
    assert abs(applied - values(BASE, batches[0], attached, {})) < 1e-5 * applied


@pytest.mark.parametrize("trainable", ["lora", "context"])
def test_frozen_parameters_do_not_move(batches, trainable) -> None:
    setup, now, frozen = begin(changed(trainable=trainable))
    before = jax.device_get(frozen)
    first = jax.device_get(now.params)
    train = train_of(setup.cfg)
    for batch in batches[:2]:
        now, _ = train(now, Networks(frozen, {}), on(setup, batch), RATE)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert largest_difference(now.params, first) > 1e-3
    names = {"/".join(path) for path in flatten_dict(now.params)}
    if trainable == "context":
        embeddings = {"context_k1", "context_k2", "context_k4", "image_up", "image_down"}
        assert {name.split("/")[1] for name in names} == embeddings
    else:
        # 6 linears of each half of a double block with q, k, v as one: 4; 4 of a single block.
        assert len(names) == 2 * (2 * 4 + 4)


def products(jaxpr, times: int = 1) -> int:
    """FLOPs of all matrix products of a program, loops counted."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            inner = math.prod(shape[i] for i in contracted)
            total += 2 * times * math.prod(eqn.outvars[0].aval.shape) * inner
            del batched
        inside = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    total += products(sub, inside)
    return total


def test_no_frozen_kernel_has_a_gradient(batches) -> None:
    """The backward pass of adapters has no product that makes something of a kernel's shape, and
    costs less than that of all parameters by one forward pass of the linear layers."""
    batch, costs, made = batches[0], {}, {}
    for trainable in ("all", "lora"):
        cfg = changed(trainable=trainable, lora=LoRAConfig(rank=1, alpha=1.0))
        setup, begun, frozen = begin(cfg)
        keys = flow_matching.sample_keys(jax.random.key(cfg.seed), batch.meta.element)

        def loss(params, setup=setup, frozen=frozen, keys=keys):
            sigmas = jnp.full(4, 0.5)
            networks = setup.merge(params, Networks(frozen, {}))
            return setup.losses(networks, batch, keys, sigmas).mean()

        program = jax.make_jaxpr(jax.value_and_grad(loss))(begun.params).jaxpr
        costs[trainable] = products(program)
        made[trainable] = outputs(program)
        if trainable == "lora":
            forward = products(jax.make_jaxpr(loss)(begun.params).jaxpr)
            blocks = [flatten_dict(frozen[name]) for name in ("double", "single")]
    kernels = {
        math.prod(leaf.shape[1:])
        for leaves in blocks
        for path, leaf in leaves.items()
        if path[-1] == "kernel" and "mod" not in path[-2]
    }
    assert kernels <= made["all"]
    assert not kernels & made["lora"]
    # At these sizes attention is more than half of a forward pass.
    assert costs["all"] - costs["lora"] > 0.35 * forward


def outputs(jaxpr) -> set[int]:
    """Sizes of the results of matrix products that sum over samples and tokens, as gradients of
    kernels are."""
    found = set()
    for eqn in jaxpr.eqns:
        dot = eqn.primitive.name == "dot_general"
        if dot and len(eqn.params["dimension_numbers"][0][0]) > 1:
            found.add(math.prod(eqn.outvars[0].aval.shape))
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    found |= outputs(sub)
    return found


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adam8bit", "muon"])
def test_optimizers_bring_the_loss_down(batches, name) -> None:
    setup, now, frozen = begin(changed(optimizer=OptimizerConfig(name=name)))
    train = train_of(setup.cfg)
    losses = []
    for _ in range(6):
        now, metrics = train(now, Networks(frozen, {}), on(setup, batches[0]), np.float32(3e-3))
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0]


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
    state_ = tx.init(unflatten_dict(draws[0]))
    for grads in draws:
        updates, state_ = tx.update(unflatten_dict(grads), state_)
    found = flatten_dict(updates)

    def alone(matrices: list[np.ndarray], expected: optax.GradientTransformation) -> np.ndarray:
        state_ = expected.init({"kernel": matrices[0]})
        for matrix in matrices:
            updates, state_ = expected.update({"kernel": matrix}, state_, {"kernel": matrix})
        return -np.asarray(updates["kernel"])

    muon = optax.contrib.muon(1.0, beta=0.9, consistent_rms=0.2)
    adam = optax.adam(1.0, 0.9, 0.99, 1e-8)

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


ON_EIGHT = """
import json, sys
sys.path.insert(0, ".")
from tests.unit.training import test_training as t
from framepack_jax.parallel import sharding
jax, np, RATE = t.jax, t.np, t.np.float32(1e-3)

def setup_of(name, mesh):
    optimizer = t.OptimizerConfig(name, learning_rate=1e-3, warmup_steps=0)
    layers = dict.fromkeys(("double_layers", "single_layers", "refiner_layers"), 1)
    remat = "none" if mesh.size == 1 else "attention"
    cfg = t.changed(optimizer=optimizer, network=layers, remat=remat)
    manifest = t.bundle.read_manifest(t.bundle.resolve("random"))
    setup = t.flow_matching_task.set_up(cfg, manifest, mesh)
    params = params_of(mesh, t.functools.partial(t.state.random_params, cfg, setup.model, mesh))
    return setup, *t.state.init_state(cfg, setup.model, setup.tx, mesh, params)

drawn = {}

def params_of(mesh, draw):
    if mesh not in drawn:
        drawn[mesh] = draw()
    return drawn[mesh]

def losses(mesh):
    setup, now, frozen = setup_of("adamw", mesh)
    loader = t.open_loader(t.Data(path=sys.argv[1]), t.packing.parse(t.SCHEDULE), setup.cfg.batch)
    run, found = t.train_step.jit_train_step(setup), []
    for batch in t.itertools.islice(loader, 3):
        batch = t.place(batch, setup.mesh, setup.cfg.batch)
        now, metrics = run(now, t.Networks(frozen, {}), batch, RATE)
        found.append(float(metrics.loss))
    return found

def changes(mesh, name):
    setup, now, _ = setup_of(name, mesh)
    where = t.state.shardings(setup.abstract)
    first, apply = jax.device_get(now.params), t.state.apply_gradients
    update = jax.jit(
        lambda now, grads: apply(now, grads, t.jnp.float32(1), setup.tx, 0.0, RATE)[0],
        out_shardings=where,
    )
    for number in range(3):
        rng = np.random.default_rng(number)
        grads = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), first)
        now = update(now, jax.device_put(grads, where.params))
    moved = jax.tree.map(np.subtract, jax.device_get(now.params), first)
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moved)])

meshes = [
    sharding.make_mesh(**sizes, devices=jax.devices()[:count])
    for count, sizes in ((1, {}), (8, {"fsdp": 4, "tensor": 2}))
]

def on_both(what, *args):
    for mesh in meshes:
        with jax.set_mesh(mesh):
            yield what(mesh, *args)

for name in ("adamw", "adafactor", "adam8bit", "muon"):
    alone, together = on_both(changes, name)
    error = np.linalg.norm(together - alone) / np.linalg.norm(alone)
    print(json.dumps([name, float(error)]))
print(json.dumps(list(on_both(losses))))
"""


def test_every_optimizer_does_on_eight_devices_what_it_does_on_one(tmp_path) -> None:
    """Losses of three steps; and what each optimizer makes of three gradients."""
    write_dataset(tmp_path, {(32, 48): (7, 9, 5, 5, 7)})
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"XLA_FLAGS": quick_flags(8)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *errors, (alone, together) = (json.loads(line) for line in done.stdout.splitlines())
    assert len(set(alone)) == 3
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert [name for name, _ in errors] == ["adamw", "adafactor", "adam8bit", "muon"]
    # A code of 8 bits may be the next one where sums come in another order.
    most = {"adamw": 1e-6, "adafactor": 1e-5, "adam8bit": 1e-3, "muon": 1e-4}
    for name, error in errors:
        assert error < most[name], (name, error)


@pytest.mark.parametrize("dtype", quantization.QUANTIZED)
def test_quantized_weights_are_not_trained(monkeypatch, dtype) -> None:
    monkeypatch.setattr(bundle, "stored_dtypes", lambda *_: {"a": "bfloat16", "b": dtype})
    with pytest.raises(ValueError, match=f"bundle made keeps its transformer in {dtype}"):
        load_network(dataclasses.replace(set_up(BASE), bundle_path="made"))


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


def test_steps_and_learning_rate_are_not_in_the_program(batches) -> None:
    """So that a run that goes on with others compiles nothing."""
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batches[0])

    def program(**fields) -> str:
        setup = set_up(changed(**fields))
        arguments = setup.abstract, Networks(setup.frozen, {}), batch, train_step.RATE
        return train_step.jit_train_step(setup).lower(*arguments).as_text()

    other = OptimizerConfig(learning_rate=3e-5, warmup_steps=7, schedule="cosine")
    assert program() == program(steps=77, optimizer=other)
    assert program() != program(optimizer=OptimizerConfig(weight_decay=0.5))


def test_alpha_far_from_the_rank_is_warned_of() -> None:
    for alpha in (1.0, 4.0, 16.0):
        lora = LoRAConfig(rank=4, alpha=alpha)
        assert summary.lora_warning(changed(trainable="lora", lora=lora)) is None
    warned = summary.lora_warning(changed(trainable="lora", lora=LoRAConfig(rank=4)))
    assert "--lora.rank 4 with --lora.alpha 32" in warned
    assert "by 8; --lora.alpha 4 makes it 1" in warned
    assert summary.lora_warning(changed(lora=LoRAConfig(rank=4))) is None


def test_a_batch_is_said_to_lie_on_devices() -> None:
    mesh = collections.namedtuple("Mesh", "shape size")
    said = [summary.batch_line(8, parts, mesh({"data": 1, "fsdp": 4}, size))
            for parts, size in ((1, 4), (2, 8))]  # fmt: skip
    assert said == [
        "batch        8 samples in all, 2 on each of 4 devices",
        "batch        8 samples in all, 2 on each of 4 groups of 2 devices, in 2 parts",
    ]


@pytest.mark.parametrize("every", [1, 3, 4])
def test_rates_do_not_depend_on_how_often_they_are_logged(monkeypatch, every) -> None:
    """Steps of one second, of which a quarter waits for data, beside checkpoints of seven."""
    now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    lines = []
    writer = type("Writer", (), {"write": lambda _, step, figures: lines.append(figures)})
    log = metrics.Log(BASE, lambda step: 0.1, [writer()], metrics.by_group, metrics.COST["all"])
    one = np.float32(0.5)
    log.begin()
    halves, zeros = np.full(4, 0.5), np.zeros(4, int)
    figures = StepMetrics(
        one, one, False, 0, {"losses": halves, "sigmas": halves, "sections": zeros, "clips": zeros}
    )
    for number in range(1, 13):
        now += 0.25
        log.wait(0.25)
        now += 0.75
        log.add(number, figures, Cost(100, 10))
        if number % every == 0:
            log.line()
        if number % 5 == 0:
            with log.paused():
                now += 7
    assert len(lines) == 12 // every
    for line in lines:
        assert (line["seconds_per_step"], line["data_wait_fraction"]) == (1.0, 0.25)
        assert (line["samples_per_second"], line["tokens_per_second"]) == (4.0, 40.0)
        assert line["model_flops_per_second"] == 3 * 4 * 100


def test_weights_decay_and_biases_do_not() -> None:
    cfg = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup_steps=0)
    params = {"head": {"out": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}}
    tx = optimizer.make(cfg, ())
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, learning_rate=0.1)
    np.testing.assert_allclose(updates["head"]["out"]["kernel"], -0.05)
    np.testing.assert_array_equal(updates["head"]["out"]["bias"], 0)


def test_the_shares_of_one_process_are_whole() -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert local_share(mesh, 8) == (0, 1)


def losses_of(changed: dict[str, float]):
    """Of a stand-in network: the number of a clip, more where a kernel's context is changed."""

    def losses_at(batch, others, sigma, blank, other):
        assert not (other.any() and batch is others)
        more = changed["blank"] * blank[0] + changed["other"] * other[0]
        return jnp.asarray(batch.meta.clip * (1.0 + more * batch.meta.element), jnp.float32)

    return losses_at


def held_out(elements, clips):
    Context = collections.namedtuple("Context", "kernels")
    Meta = collections.namedtuple("Meta", "element clip")
    Held = collections.namedtuple("Held", "meta context")
    return Held(Meta(jnp.asarray(elements), jnp.asarray(clips)), Context(("k1", "k2")))


def test_validation_counts_clips_alike() -> None:
    """Samples that fill up a batch once, clips with many samples like those with one."""
    first, second = held_out([0, 1, 1, 2], [1, 1, 1, 4]), held_out([3, 3], [7, 7])
    found = validation.losses(
        losses_of({"blank": 0.5, "other": 2.0}), [(first, second), (second, None)], (0.5,), True
    )
    assert found["validation/loss"] == found["validation/loss_sigma_0.5"] == 4.0
    # Rises: of clip 1 the mean of 0 and 0.5, of clip 4 4, of clip 7 10.5.
    rises = np.asarray([0.25, 4.0, 10.5])
    np.testing.assert_allclose(found["context/k1_blank"], rises.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        found["context/k1_blank_error"], rises.std(ddof=1) / 3**0.5, rtol=1e-6
    )
    assert found["context/k2_blank"] == 0
    # There is no other clip in the second bucket: clips 1 and 4 alone.
    np.testing.assert_allclose(found["context/k1_other"], np.mean([1.0, 16.0]), rtol=1e-6)


def test_of_one_clip_there_is_no_error() -> None:
    found = validation.losses(
        losses_of({"blank": 1.0, "other": 1.0}), [(held_out([0, 1], [3, 3]), None)], (0.5,), True
    )
    assert "context/k1_blank" in found and not any("error" in name for name in found)
    assert not any("other" in name for name in found)


def test_what_is_not_finite_is_null_in_the_log(tmp_path) -> None:
    log = metrics.Jsonl(tmp_path, 0)
    log.write(1, {"loss": float("nan"), "grad_norm": 1.0})
    log.close()
    (line,) = (tmp_path / metrics.LOG).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "grad_norm": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "--batch 0"),
        ({"output": "gs://bucket/run"}, "--output gs://bucket/run: expected a folder on a disk"),
        ({"grad_accum_steps": 3}, "--grad-accum-steps 3 does not divide --batch 4"),
        ({"ema": 1.0}, "--ema 1.0"),
        ({"optimizer": OptimizerConfig(learning_rate=float("nan"))}, "learning-rate nan"),
        ({"init": "bundle"}, "--init bundle takes a network as it is"),
        ({"init": "scratch", "trainable": "lora"}, "lora would leave random ones frozen"),
        ({"validation": ValidationConfig(every=-1)}, "--validation.every -1"),
        ({"validation": ValidationConfig(samples=0)}, "--validation.samples 0"),
        ({"validation": ValidationConfig(videos=-2)}, "--validation.videos -2"),
        ({"checkpoints": CheckpointConfig(keep_every=-1)}, "--checkpoints.keep-every -1"),
    ],
)
def test_impossible_configurations_are_named(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**fields)
