"""Training of a part of the parameters: adapters and context embeddings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from framepack_jax.models import lora, lora_layers
from framepack_jax.models.lora_layers import scale_factors
from framepack_jax.models.params import merge_params
from framepack_jax.training import flow_matching, state
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.flow_matching_task import Networks
from tests.fixtures.compiling import QUICK
from tests.fixtures.training_steps import (
    BASE,
    RATE,
    begin,
    changed,
    largest_difference,
    on,
    set_up,
    train_of,
)

BOTH = changed(trainable="lora", lora=dataclasses.replace(BASE.lora, context=True))


def values(cfg: TrainConfig, batch, params, frozen) -> float:
    """The loss alone."""
    setup = set_up(cfg)
    keys = flow_matching.sample_keys(jax.random.key(cfg.seed), batch.meta.element)
    sigmas = jnp.asarray([0.1, 0.4, 0.7, 1.0])

    def compute(params, frozen):
        return setup.losses(setup.merge(params, Networks(frozen, {})), batch, keys, sigmas)

    losses = jax.jit(compute, compiler_options=QUICK)(params, frozen)
    return float(losses.mean())


def perturbed(params, key=0):
    """Parameters none of which is zero."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


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


EMBEDDINGS = {"context_k1", "context_k2", "context_k4", "image_up", "image_down"}
# 6 linears of each half of a double block with q, k, v as one: 4; 4 of a single block.
FACTORS = 2 * (2 * 4 + 4)


@pytest.mark.parametrize("trainable", ["lora", "context", "both"])
def test_frozen_parameters_do_not_move(batches, trainable) -> None:
    cfg = changed(trainable=trainable) if trainable != "both" else BOTH
    setup, now, frozen = begin(cfg)
    before = jax.device_get(frozen)
    first = jax.device_get(now.params)
    train = train_of(setup.cfg)
    for batch in batches[:2]:
        now, _ = train(now, Networks(frozen, {}), on(setup, batch), RATE)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    names = ["/".join(path) for path in flatten_dict(now.params)]
    embedded = {name.split("/")[1] for name in names if name.startswith("embed/")}
    assert embedded == (set() if trainable == "lora" else EMBEDDINGS)
    factors = sum("/lora_" in name for name in names)
    assert factors == (0 if trainable == "context" else FACTORS)
    for part in first:
        assert largest_difference(now.params[part], first[part]) > 1e-3


def test_layers_that_no_network_has_are_named() -> None:
    lora = dataclasses.replace(BASE.lora, targets=r"blocks/(qkv|out)")
    named = r"--lora.targets 'blocks/\(qkv\|out\)' matches no linear layer .*single/mlp_in"
    with pytest.raises(ValueError, match=named):
        set_up(changed(trainable="lora", lora=lora))
