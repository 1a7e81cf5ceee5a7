"""Patch embeddings and RoPE of context under any kernel."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import packing
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.spec import TRANSFORMER as HUNYUAN
from framepack_jax.models.packed_video import (
    ContextEmbed,
    EmbedVideo,
    context_kernels,
    rope_tables,
)
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.models.wan.spec import TRANSFORMER as WAN
from framepack_jax.packing import Timeline
from tests.fixtures.random_networks import example, wan_example

CFG = TransformerConfig(
    in_channels=4, heads=1, head_dim=16, rope_axes=(4, 6, 6), context_kernels=()
)
# Kernels of rate 64 as the paper names them, others of odd sides, and pooled ones.
CONTEXTS = ("f70k64h1w1f30k16h2w2f9k4h4w4f3k1h8w8", "f7k3h3w5", "f70k32f20k16")


@pytest.mark.parametrize("text", CONTEXTS)
def test_every_kernel_embeds_its_tokens_at_their_places(text: str) -> None:
    """Tokens, their tables and the count of `packing` agree, also where the kernel does not divide
    the latents; gradients reach the weights and the latents."""
    schedule = packing.parse(f"td_{text}f1k1_g2")
    cfg = dataclasses.replace(CFG, context_kernels=context_kernels(schedule))
    timeline = Timeline.of(np.random.default_rng(0).standard_normal((1, 125, 6, 10, 4), np.float32))
    section = packing.plan(schedule, 62)[-1]
    context = packing.read_context(section, timeline)
    target = timeline.read(section.targets)
    counts = [n for _, n in packing.context_tokens(schedule, 6, 10)]
    length = sum(counts) + packing.target_tokens(schedule, 6, 10)
    params = EmbedVideo(cfg).init(jax.random.key(0), target, context)

    def total(params, latents):
        read = dataclasses.replace(context, latents=latents)
        return (EmbedVideo(cfg).apply(params, target, read) ** 2).sum()

    assert EmbedVideo(cfg).apply(params, target, context).shape == (1, length, cfg.width)
    cos, sin = rope_tables(cfg, target.shape, context)
    assert cos.shape == sin.shape == (1, length, 8)
    assert float((cos**2 + sin**2).max()) <= 1 + 1e-6
    grads = jax.grad(total, argnums=(0, 1))(params, context.latents)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))


def test_k32_pools_by_four_into_the_weights_of_k8() -> None:
    latents = np.random.default_rng(0).standard_normal((1, 32, 64, 64, 2), np.float32)
    cfg = dataclasses.replace(CFG, in_channels=2)
    params = ContextEmbed(cfg).init(jax.random.key(0), jnp.zeros((1, 8, 16, 16, 2)), "k8")
    pooled = latents.reshape(1, 8, 4, 16, 4, 16, 4, 2).mean((2, 4, 6))
    ours = ContextEmbed(cfg).apply(params, latents, "k32")
    theirs = ContextEmbed(cfg).apply(params, pooled, "k8")
    assert ours.shape == (1, 1, cfg.width)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_cell_of_its_own_is_embedded_in_order_of_time() -> None:
    """k64h1w1: one token for each latent cell, of 64 frames."""
    latents = np.random.default_rng(0).standard_normal((1, 64, 2, 2, 4), np.float32)
    weights = np.random.default_rng(1).standard_normal((64 * 4, CFG.width), np.float32)
    params = {"params": {"kernel": weights, "bias": np.zeros(CFG.width, np.float32)}}
    ours = ContextEmbed(CFG).apply(params, latents, "k64h1w1")
    cells = latents[0].transpose(1, 2, 0, 3).reshape(4, math.prod(latents.shape[1::3]))
    np.testing.assert_allclose(ours[0], cells @ weights, atol=1e-3)


NETWORKS = {
    "hunyuan": (
        HUNYUAN,
        TransformerConfig(
            in_channels=4, out_channels=4, heads=2, head_dim=6, double_layers=1, single_layers=1,
            refiner_layers=1, mlp_ratio=2.0, text_dim=16, pooled_dim=8, image_dim=8,
            rope_axes=(2, 2, 2), context_kernels=("k1", "k2"),
        ),
    ),
    "wan": (
        WAN,
        WanConfig(
            in_channels=4, out_channels=4, heads=2, head_dim=6, layers=2, mlp_dim=16, text_dim=8,
            time_dim=8, rope_axes=(2, 2, 2), context_kernels=("k1", "k2"), clean_context=True,
            prompt_to_target=True,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_tokens_of_a_tail_cannot_change_the_output(name: str) -> None:
    """Exactly, whatever they hold. And a tail with places for frames to come is that of the frames
    which are there alone."""
    spec, cfg = NETWORKS[name]
    random = np.random.default_rng(0)
    make = example if name == "hunyuan" else wan_example
    params, (x, sigma, _, conditions), _ = make(cfg)
    x, sigma, conditions = jax.tree.map(lambda leaf: leaf[:2], (x, sigma, conditions))
    latents = random.standard_normal((2, 13, *x.shape[2:]), np.float32)
    plan = packing.plan(packing.parse("ta_f2k2f1k1_g2"), 6)
    context = packing.read_context(plan[-1], Timeline.of(latents))
    frames = len([p for p in plan[-1].groups[0].reads if p != packing.MISSING])
    assert frames == 8 and context.masked.tolist() == [252, 252]
    velocity = jax.jit(lambda context: spec.velocity(cfg, params, x, sigma, context, conditions))
    found = velocity(context)

    def with_tail(tail: np.ndarray, indices: np.ndarray, masked: int) -> packing.PackedContext:
        return dataclasses.replace(
            context,
            latents=(tail, *context.latents[1:]),
            indices=(indices, *context.indices[1:]),
            masked=np.full(2, masked, np.int32),
        )

    tail, indices = context.latents[0], context.indices[0]
    noise = random.standard_normal(tail.shape, np.float32)
    noise[:, -frames:] = tail[:, -frames:]
    np.testing.assert_array_equal(velocity(with_tail(noise, indices, 252)), found)
    noise[:, -frames] += 1
    assert np.abs(velocity(with_tail(noise, indices, 252)) - found).max() > 1e-4
    alone = velocity(with_tail(tail[:, -frames:], indices[:, -frames:], 0))
    np.testing.assert_allclose(alone, found, atol=2e-5)
