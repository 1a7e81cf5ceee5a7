"""Networks whose frames read no later frame, through all blocks of all families."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import packing
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.spec import TRANSFORMER as HUNYUAN
from framepack_jax.models.packed_video import attention_pairs
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.models.wan.spec import TRANSFORMER as WAN
from tests.fixtures.random_networks import example, wan_example

FRAMES = 3
NETWORKS = {
    "hunyuan": (
        HUNYUAN, example,
        TransformerConfig(
            in_channels=4, out_channels=4, heads=2, head_dim=6, double_layers=2, single_layers=2,
            refiner_layers=1, mlp_ratio=2.0, text_dim=16, pooled_dim=8, image_dim=8,
            rope_axes=(2, 2, 2), context_kernels=("k1",),
        ),
    ),
    "wan": (
        WAN, wan_example,
        WanConfig(
            in_channels=4, out_channels=4, heads=2, head_dim=6, layers=3, mlp_dim=16, text_dim=8,
            time_dim=8, rope_axes=(2, 2, 2), context_kernels=("k1",),
        ),
    ),
}  # fmt: skip


def inputs_of(name: str):
    """(spec, config, parameters, inputs of `velocity`) of two samples with three target frames."""
    spec, make, cfg = NETWORKS[name]
    params, inputs, _ = make(cfg)
    x, sigma, context, conditions = jax.tree.map(lambda leaf: leaf[-2:], inputs)
    x = np.random.default_rng(0).standard_normal((2, FRAMES, *x.shape[2:]), np.float32)
    indices = np.tile(np.arange(1, 1 + FRAMES, dtype=np.int32), (2, 1))
    context = dataclasses.replace(context, target_indices=indices)
    return spec, cfg, params, (x, sigma, context, conditions)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_frame_depends_on_a_later_one(name: str) -> None:
    """The gradient is exactly 0, through several blocks with tokens of context, image and prompt
    that all frames read."""
    spec, cfg, params, (x, sigma, context, conditions) = inputs_of(name)

    network = dataclasses.replace(cfg, causal=True)

    def outputs(x, latents):
        read = dataclasses.replace(context, latents=latents)
        velocity = spec.velocity(network, params, x, sigma, read, conditions)
        return jnp.sum(jnp.sin(velocity), axis=(0, 2, 3, 4))

    by_x, (by_context,) = jax.device_get(jax.jit(jax.jacrev(outputs, (0, 1)))(x, context.latents))
    by_frame = np.abs(by_x).sum(axis=(1, 3, 4, 5))
    later = np.triu(np.ones((FRAMES, FRAMES), bool), 1)
    assert (by_frame[later] == 0).all() and (by_frame[~later] > 1e-3).all()
    assert (np.abs(by_context).sum(axis=(1, 2, 3, 4, 5)) > 1e-3).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_of_a_cache_and_shorter_targets_see_the_same(name: str) -> None:
    """Frames are what they are without those after them, also by the parts that a step cache
    calls."""
    spec, cfg, params, (x, sigma, context, conditions) = inputs_of(name)
    cfg = dataclasses.replace(cfg, causal=True)
    short = dataclasses.replace(context, target_indices=context.target_indices[:, :2])
    hooks = spec.step_cache

    @jax.jit
    def ways(x):
        whole = spec.velocity(cfg, params, x, sigma, context, conditions)
        tokens = hooks.embed(cfg, params, x, sigma, context, conditions)
        tokens = hooks.first_block(cfg, params, tokens)
        img = hooks.run_blocks(cfg, params, tokens, 1)
        parts = hooks.head(cfg, params, img, tokens.vec, x.shape)
        return whole, parts, spec.velocity(cfg, params, x[:, :2], sigma, short, conditions)

    whole, parts, first = ways(x)
    np.testing.assert_allclose(parts, whole, atol=2e-5)
    np.testing.assert_allclose(first, whole[:, :2], atol=2e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_work_of_attention_is_counted(name: str) -> None:
    spec, _, cfg = NETWORKS[name]
    causal = dataclasses.replace(cfg, causal=True)
    # Ten tokens, of which the last six are three frames.
    place = np.array([-1] * 4 + [0, 0, 1, 1, 2, 2])
    assert attention_pairs(causal, 10, 6, 3) == (place[None] <= place[:, None]).sum()
    assert attention_pairs(cfg, 10, 6, 3) == 100
    size = packing.parse("td_f1k1_g3"), 4, 6, 5, 3
    assert spec.forward_flops(causal, *size) < spec.forward_flops(cfg, *size)
