"""Noise levels of samples and noise in the history."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from framepack_jax import packing
from framepack_jax.diffusion import flow
from framepack_jax.training import flow_matching
from framepack_jax.training.config import NoiseSchedule
from framepack_jax.training.flow_matching_task import Networks
from tests.fixtures.training_steps import SCHEDULE, changed, set_up


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


def test_gradients_of_blocks_are_reduced_in_the_dtype_of_their_weights() -> None:
    """A network reads float32 weights, or those that were rounded before."""
    for name in ("float32", "bfloat16"):
        cfg = changed(dtype="bfloat16", reduce_dtype=name)
        task = set_up(cfg)
        merged = jax.eval_shape(task.merge, task.abstract.params, Networks(task.frozen, {}))
        read = {path: leaf.dtype.name for path, leaf in flatten_dict(merged.transformer).items()}
        assert read["double", "img_qkv", "kernel"] == read["single", "q_norm", "scale"] == name
        assert read["head", "out", "kernel"] == "float32"
