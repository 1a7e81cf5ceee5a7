"""Steps of training: loss, gradient, moving average, and batches that are not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from framepack_jax.conversion import transformer as conversion
from framepack_jax.models import scan
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.training import flow_matching
from framepack_jax.training.config import HistoryConfig, TrainConfig
from framepack_jax.training.flow_matching_task import Networks
from tests.fixtures.compiling import QUICK
from tests.fixtures.torch_reference import relative_error
from tests.fixtures.training_steps import (
    BASE,
    RATE,
    begin,
    changed,
    largest_difference,
    on,
    train_of,
)


def gradient(cfg: TrainConfig, batch, params=None):
    """Loss and gradient of the trained parameters."""
    setup, begun, frozen = begin(cfg)
    keys = flow_matching.sample_keys(jax.random.key(cfg.seed), batch.meta.element)
    key, elements = jax.random.key(cfg.seed), batch.meta.element
    sigmas = flow_matching.draw_sigmas(cfg.noise_schedule, key, elements, cfg.batch, 0.7)

    def loss(params):
        losses = setup.losses(setup.merge(params, Networks(frozen, {})), batch, keys, sigmas)
        return jnp.mean(losses)

    compute = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    return compute(begun.params if params is None else params)


@pytest.mark.parametrize("remat", [name for name in scan.REMAT if name != "none"])
def test_what_is_kept_does_not_change_the_gradient(batches, remat) -> None:
    expected = gradient(BASE, batches[0])
    found = gradient(changed(remat=remat), batches[0])
    assert largest_difference(found, expected) < 1e-5


def test_parts_of_a_batch_make_the_same_step(batches) -> None:
    results = []
    for parts in (1, 2, 4):
        setup, begun, frozen = begin(changed(grad_accum_steps=parts))
        new, metrics = train_of(setup.cfg)(begun, Networks(frozen, {}), on(setup, batches[0]), RATE)
        # The first moment of Adam is the clipped gradient, times a constant.
        moment = np.concatenate([np.ravel(x) for x in jax.tree.leaves(new.opt_state[1].mu)])
        seen = metrics.figures["losses"], metrics.figures["sigmas"], metrics.grad_norm
        results.append((moment, *seen))
    for other in results[1:]:
        np.testing.assert_allclose(other[1], results[0][1], rtol=2e-5)
        np.testing.assert_allclose(other[2], results[0][2], rtol=1e-6)
        # Adam does not see the size of the gradient; clipping does.
        np.testing.assert_allclose(other[3], results[0][3], rtol=1e-4)
        assert relative_error(other[0], results[0][0]) < 1e-4


def test_rollouts_change_every_second_step_also_in_parts(batches) -> None:
    """A step finds by its samples whether it predicts the history, as it does after a resume."""

    def loss_of(cfg: TrainConfig):
        setup, begun, frozen = begin(cfg)
        params, key = setup.merge(begun.params, Networks(frozen, {})), setup.key(begun.step)
        return jax.jit(lambda batch: setup.loss(params, batch, key)[0], compiler_options=QUICK)

    plain, rolling = loss_of(BASE), loss_of(changed(history=HistoryConfig(rollouts=0.5)))
    np.testing.assert_allclose(rolling(batches[0]), plain(batches[0]), rtol=1e-5)
    whole = rolling(batches[1])
    assert np.abs(whole / plain(batches[1]) - 1).max() > 1e-3
    # A part has every second sample of a batch.
    part = rolling(jax.tree.map(lambda x: x[1::2], batches[1]))
    np.testing.assert_allclose(part, whole[1::2], rtol=2e-5)


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


def test_a_model_from_a_base_model_begins_with_gradients_of_common_size(batches) -> None:
    """Image tokens that were exactly zero multiplied the norm of the gradient."""
    setup, begun, frozen = begin(BASE)
    table = conversion.from_base(conversion.DIFFUSERS, ("k1", "k2", "k4"), 24)
    new = {row.targets[0]: row for row in table.rows(setup.model.cfg) if not row.sources}
    assert sorted(new) == [
        f"embed/image_{name}/{leaf}" for name in ("down", "up") for leaf in ("bias", "kernel")
    ]

    def norm(down: float) -> float:
        leaves = flatten_dict(begun.params, sep="/")
        for path, row in new.items():
            (leaves[path],) = map(jnp.asarray, row.transform([], [leaves[path].shape]))
        leaves["embed/image_down/kernel"] *= down
        state = begun.replace(params=unflatten_dict(leaves, sep="/"))
        return float(train(state, Networks(frozen, {}), on(setup, batches[0]), RATE)[1].grad_norm)

    train = train_of(BASE)
    random = float(train(begun, Networks(frozen, {}), on(setup, batches[0]), RATE)[1].grad_norm)
    assert 0.5 < norm(1.0) / random < 2
    assert norm(0.0) / random > 2


def test_a_moving_average_follows_by_hand(batches) -> None:
    """With a warm-up of its decay: 0.1, 2/11, 0.2 and, in place of 4/13, 0.2."""
    setup, now, frozen = begin(changed(ema=0.2))
    train = train_of(setup.cfg)
    average = jax.tree.map(np.asarray, now.params)
    for batch, d in zip(batches, (0.1, 2 / 11, 0.2, 0.2), strict=True):
        now, _ = train(now, Networks(frozen, {}), on(setup, batch), RATE)
        average = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * p, average, now.params)
    assert largest_difference(now.ema, average) < 1e-6
    assert largest_difference(now.ema, now.params) > 1e-3


@pytest.mark.parametrize("kind", ["not finite", "spike"])
def test_a_step_that_is_not_finite_or_a_spike_is_left_out(batches, kind) -> None:
    """A limit that is not exceeded changes no bit of an update."""
    setup, now, frozen = begin(changed(ema=0.9))
    train = train_of(setup.cfg)
    bad = batches[0].replace(target=np.full_like(batches[0].target, np.nan))
    expected = train(now, Networks(frozen, {}), on(setup, batches[0]), RATE)
    limits = () if kind == "not finite" else (expected[1].grad_norm,)
    now, metrics = train(now, Networks(frozen, {}), on(setup, batches[0]), RATE, *limits)
    assert not metrics.skipped
    jax.tree.map(np.testing.assert_array_equal, (now, metrics), expected)
    if kind == "spike":
        bad = batches[0].replace(target=batches[0].target * 100)
    before = jax.device_get(now)
    for count in (1, 2):
        now, metrics = train(now, Networks(frozen, {}), on(setup, bad), RATE, *limits)
        assert np.isfinite(metrics.grad_norm) == (kind == "spike")
        assert metrics.skipped and int(now.skipped_in_a_row) == count
    after = jax.device_get(now)
    for name in ("params", "opt_state", "ema"):
        pairs = zip(
            jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)),
            strict=True,
        )  # fmt: skip
        assert all(np.array_equal(a, b) for a, b in pairs)
    limits = limits and (jnp.float32(np.inf),)
    now, metrics = train(now, Networks(frozen, {}), on(setup, batches[1]), RATE, *limits)
    assert not metrics.skipped and int(now.skipped) == 2 and int(now.skipped_in_a_row) == 0
    assert int(now.step) == 4
    # Steps that were left out are no updates, and the optimizer counts as we do.
    counts = {int(x) for x in jax.tree.leaves(now.opt_state) if x.dtype == np.int32 and not x.ndim}
    assert counts == {int(now.updates)} == {2}
