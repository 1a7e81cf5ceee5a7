"""Flow shift and straight-path algebra: golden numbers, diffusers' scheduler, closed forms."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from framepack_jax.diffusion import flow, solver
from tests.fixtures.torch_reference import relative_error


@pytest.mark.golden
def test_shift_equals_the_release(golden):
    rows = json.loads((golden / "flow_shift.json").read_text())
    assert rows
    for row in rows:
        mu = flow.shift_mu(row["tokens"])
        assert mu == pytest.approx(row["mu"], abs=1e-6)
        sigmas = flow.sigmas(row["steps"], mu)
        assert sigmas.shape == (row["steps"] + 1,)
        np.testing.assert_allclose(sigmas, row["sigmas"], rtol=0, atol=1e-6)


def test_shift_at_its_defining_points():
    assert flow.shift_mu(256) == pytest.approx(0.5)
    assert flow.shift_mu(4096) == pytest.approx(1.15)
    assert np.exp(flow.shift_mu(10**6)) == pytest.approx(7)


def test_sigmas_fall_from_one_to_zero():
    sigmas = flow.sigmas(25, 1.7)
    assert sigmas.dtype == np.float64
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (np.diff(sigmas) < 0).all()
    np.testing.assert_allclose(flow.sigmas(5, 0.0), np.linspace(1, 0, 6), atol=1e-15)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps is 0"):
        flow.sigmas(0, 1.0)


@pytest.mark.parametrize("sigma", [0.3, np.float32([0.2, 0.9])])
def test_x0_is_recovered_from_the_path(sigma):
    rng = np.random.default_rng(0)
    x, noise = jnp.asarray(rng.normal(size=(2, 2, 3, 4, 3, 5)), jnp.float32)
    x_t = flow.interpolate(x, noise, sigma)
    if np.ndim(sigma):
        np.testing.assert_allclose(x_t[1], 0.1 * x[1] + 0.9 * noise[1], atol=1e-6)
    back = flow.x0_from_velocity(x_t, flow.velocity_target(x, noise), sigma)
    np.testing.assert_allclose(back, x, atol=1e-6)


def test_low_precision_input_is_computed_in_float32():
    x = jnp.ones((1, 4), jnp.bfloat16)
    assert flow.interpolate(x, x, 0.5).dtype == jnp.float32
    assert flow.velocity_target(x, x).dtype == jnp.float32
    np.testing.assert_allclose(flow.x0_from_velocity(x, x, 2.0**-10), 1 - 2.0**-10, rtol=1e-7)


@pytest.mark.parametrize("steps,tokens", [(4, 1000), (9, 4096)])
def test_euler_equals_diffusers(steps, tokens):
    """Its flow-matching scheduler with dynamic shift, on a field that depends on x and sigma."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = flow.shift_mu(tokens)
    sigmas = flow.sigmas(steps, mu)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1], mu=mu)
    np.testing.assert_allclose(sigmas, scheduler.sigmas, atol=1e-6)

    x = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 2, 3, 4, 4)).astype(np.float32))
    state = solver.start(jnp.asarray(x.numpy()))
    for sigma, t, row in zip(sigmas, scheduler.timesteps, solver.euler(sigmas), strict=False):
        velocity = jnp.sin(2 * state.x) + sigma * state.x
        state = solver.step(state, flow.x0_from_velocity(state.x, velocity, sigma), row)
        x = scheduler.step(torch.sin(2 * x) + float(sigma) * x, t, x).prev_sample
        assert relative_error(state.x, x) < 1e-5
