"""Noise levels, guidance and keys of samples."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from framepack_jax import packing
from framepack_jax.data.holdout import FIRST_ELEMENT
from framepack_jax.diffusion import flow
from framepack_jax.training import draws, flow_matching
from framepack_jax.training.config import NoiseSchedule
from framepack_jax.training.flow_matching_task import FlowMatchingTask, Networks
from tests.fixtures.training_steps import SCHEDULE, changed, set_up

KEY, COUNT = jax.random.key(3), 20_000


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def levels(schedule: NoiseSchedule, elements, batch: int = 8, mu: float = 0.9) -> jax.Array:
    return flow_matching.draw_sigmas(schedule, KEY, elements, batch, mu)


@pytest.mark.parametrize("stratified", [True, False])
def test_noise_levels_are_shifted_as_in_sampling(stratified) -> None:
    mu = 0.9
    uniform = levels(NoiseSchedule("uniform", stratified=stratified), jnp.arange(COUNT))
    # Quantiles of the uniform t are those of the sampler's grid.
    grid = flow.sigmas(4, mu)[::-1]
    np.testing.assert_allclose(np.quantile(uniform, [0.25, 0.5, 0.75]), grid[1:4], atol=0.01)
    given = NoiseSchedule(mean=0.3, std=0.8, mu=0.0, stratified=stratified)
    logits = jax.scipy.special.logit(levels(given, jnp.arange(COUNT)))
    assert abs(logits.mean() - 0.3) < 0.02 and abs(logits.std() - 0.8) < 0.02
    assert len(np.unique(uniform)) > 19_000


@pytest.mark.parametrize("distribution", ["uniform", "logit-normal"])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
def test_as_many_levels_are_high_as_configured(distribution, share) -> None:
    found = np.asarray(levels(NoiseSchedule(distribution, high=share), jnp.arange(COUNT)))
    assert abs((found > 0.95).mean() - share) < 0.01
    # They are uniform there; the others are distributed as without this setting.
    if share:
        np.testing.assert_allclose(
            np.quantile(found[found > 0.95], [0.2, 0.6]), [0.96, 0.98], atol=0.001
        )
    plain = np.asarray(levels(NoiseSchedule(distribution), jnp.arange(COUNT)))
    if share < 1:
        np.testing.assert_allclose(
            np.quantile(found[found < 0.95], [0.1, 0.5, 0.9]),
            np.quantile(plain[plain < 0.95], [0.1, 0.5, 0.9]), atol=0.01,
        )  # fmt: skip
    if distribution == "logit-normal":
        assert (plain > 0.95).mean() < 0.05


def test_levels_of_a_batch_are_spread_evenly() -> None:
    """One in each eighth of the distribution, in every batch; each place sees all levels."""
    schedule = NoiseSchedule("uniform", mu=0.0)
    found = np.asarray(levels(schedule, jnp.arange(COUNT))).reshape(-1, 8)
    for batch in found:
        assert sorted(np.floor(8 * batch).astype(int)) == list(range(8))
    np.testing.assert_allclose(np.quantile(found, [0.25, 0.5, 0.75], axis=0).T,
                               np.tile([0.25, 0.5, 0.75], (8, 1)), atol=0.03)  # fmt: skip
    alone = np.asarray(levels(NoiseSchedule("uniform", mu=0.0, stratified=False),
                              jnp.arange(COUNT))).reshape(-1, 8)  # fmt: skip
    assert found.mean(axis=1).std() < 0.4 * alone.mean(axis=1).std()


def test_levels_do_not_depend_on_hosts_or_parts() -> None:
    schedule = NoiseSchedule(high=0.2)
    whole = np.asarray(levels(schedule, jnp.arange(80)))
    for first in range(4):
        part = levels(schedule, jnp.arange(first, 80, 4))
        np.testing.assert_array_equal(part, whole[first::4])


def test_guidance_is_drawn_from_a_range() -> None:
    keys = flow_matching.sample_keys(KEY, jnp.arange(COUNT))
    np.testing.assert_array_equal(flow_matching.guidance_of(3.0, keys), np.full(COUNT, 3.0))
    drawn = np.asarray(flow_matching.guidance_of((1.0, 10.0), keys))
    np.testing.assert_allclose(np.quantile(drawn, [0, 0.5, 1]), [1, 5.5, 10], atol=0.1)


def test_every_draw_has_a_key_of_its_own() -> None:
    """Also those of weights, of adapters and of batches, and of held-out samples."""
    samples = flow_matching.sample_keys(
        KEY, jnp.asarray([0, 1, 2, FIRST_ELEMENT - 1, FIRST_ELEMENT, FIRST_ELEMENT + 1])
    )
    domains = [jax.random.fold_in(KEY, d) for d in (draws.WEIGHTS, draws.ADAPTERS, draws.LEVELS)]
    roots = jnp.concatenate([samples, jnp.stack(domains)])
    numbers = jnp.asarray([*draws.Draw])
    made = jax.vmap(lambda root: jax.vmap(lambda n: jax.random.fold_in(root, n))(numbers))(roots)
    data = np.concatenate([
        jax.random.key_data(keys).reshape(-1, 2) for keys in (roots, made, KEY[None])
    ])  # fmt: skip
    assert len(np.unique(data, axis=0)) == len(data) == 9 * (1 + len(numbers)) + 1


def test_the_former_name_of_mu_is_named() -> None:
    with pytest.raises(ValueError, match=r"NoiseSchedule\(shift=1\) is now NoiseSchedule\(mu=1\)"):
        NoiseSchedule(shift=1.0)
    with pytest.raises(ValueError, match=r"remove --noise-schedule.no-stratified"):
        NoiseSchedule(high=0.2, stratified=False)


def test_the_shift_is_that_of_the_section(batches) -> None:

    rows, columns = batches[0].target.shape[2:4]
    expected = flow.shift_mu(packing.target_tokens(packing.parse(SCHEDULE), rows, columns))
    assert flow_matching.section_mu(batches[0].target.shape) == expected


def test_gradients_of_blocks_are_reduced_in_the_dtype_of_their_weights() -> None:
    """A network reads float32 weights, or those that were rounded before."""
    for name in ("float32", "bfloat16"):
        cfg = changed(dtype="bfloat16", reduce_dtype=name)
        task = set_up(cfg)
        merged = jax.eval_shape(task.merge, task.abstract.params, Networks(task.frozen, {}))
        read = {path: leaf.dtype.name for path, leaf in flatten_dict(merged.transformer).items()}
        assert read["double", "img_qkv", "kernel"] == read["single", "q_norm", "scale"] == name
        assert read["head", "out", "kernel"] == "float32"


@pytest.mark.parametrize("held_out", [True, False])
def test_validation_comes_every_so_many_steps_and_after_the_last(held_out) -> None:
    cfg = SimpleNamespace(validation=SimpleNamespace(every=4), steps=10)
    task = SimpleNamespace(cfg=cfg, validates=held_out)
    after = [n for n in range(1, 11) if FlowMatchingTask.validates_after(task, n)]
    assert after == ([4, 8, 10] if held_out else [])
