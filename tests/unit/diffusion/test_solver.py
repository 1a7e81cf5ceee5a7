"""UniPC and Euler: golden runs, closed forms, and the convergence orders they should have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax.diffusion import SOLVERS, flow, solver, solver_table, unipc
from tests.fixtures.torch_reference import relative_error

step = jax.jit(solver.step)


def run(denoise, noise, sigmas, table):
    """The last state of a sampling run."""
    state = solver.start(noise)
    for sigma, row in zip(sigmas[:-1], table, strict=True):
        state = step(state, denoise(state.x, sigma), row)
    return state


@jax.jit
def golden_denoiser(x, sigma):
    return 0.8 * jnp.tanh(1.3 * x) + 0.1 * sigma * jnp.cos(3 * x)


@pytest.mark.golden
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_equals_the_release(golden, variant):
    runs = np.load(golden / "unipc.npz")
    tags = {key.split("/")[0] for key in runs if key.startswith(variant)}
    assert tags
    for tag in sorted(tags):
        steps, tokens = (int(part.lstrip("stepq")) for part in tag.split("_")[1:])
        sigmas = flow.sigmas(steps, flow.shift_mu(tokens))
        np.testing.assert_allclose(runs[f"{tag}/sigmas"], sigmas, rtol=0, atol=1e-6)
        noise = jnp.asarray(runs[f"{tag}/noise"])
        state = run(golden_denoiser, noise, sigmas, unipc.table(sigmas, variant))
        assert relative_error(state.x, runs[f"{tag}/result"]) < 2e-5, tag
        assert relative_error(state.base, runs[f"{tag}/last_x"]) < 2e-5, tag


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 25])
def test_an_exact_constant_prediction_stays_on_the_path(name, steps):
    rng = np.random.default_rng(2)
    x0, noise = jnp.asarray(rng.normal(size=(2, 2, 6)), jnp.float32)
    sigmas = flow.sigmas(steps, 1.2)
    state = solver.start(noise)
    for sigma, row in zip(sigmas[:-1], solver_table(name, sigmas), strict=True):
        path = flow.interpolate(x0, noise, sigma)
        np.testing.assert_allclose(state.x, path, atol=2e-6)
        state = step(state, x0, row)
        np.testing.assert_allclose(state.base, path, atol=2e-6)
    np.testing.assert_allclose(state.x, x0, atol=1e-7)


@pytest.mark.parametrize(
    "name,order", [("euler", 1), ("unipc", 3), ("unipc-bh2", 3)], ids=lambda x: str(x)
)
def test_convergence_order(name, order):
    """x0 = k x gives dx / d sigma = (1 - k) x / sigma, so x(sigma) = x(1) sigma^(1 - k).

    Steps even in log sigma from 1 to 0.05; the last row is not part of the smooth problem.
    """

    def error(steps, k=0.7):
        with jax.enable_x64(True):
            noise = jnp.ones((1, 3), jnp.float64)
            sigmas = np.append(np.geomspace(1, 0.05, steps + 1), 0)
            table = solver_table(name, sigmas)
            state = solver.start(noise)
            for row in table[:-1]:
                state = solver.step(state, k * state.x, row)
            return abs(float(state.x[0, 0]) - 0.05 ** (1 - k))

    measured = np.log2(error(64) / error(128))
    assert measured == pytest.approx(order, abs=0.35)


def test_a_table_ends_in_the_last_prediction_and_is_finite():
    for name in SOLVERS:
        for steps in (1, 2, 3, 50):
            table = solver_table(name, flow.sigmas(steps, 1.9459))
            assert table.shape == (steps, solver.COLUMNS) and table.dtype == np.float64
            assert np.isfinite(table).all()
            np.testing.assert_array_equal(table[-1, solver.PREDICTOR], [0, 1, 0, 0])


def test_one_compiled_step_serves_steps_and_solvers():
    fresh = jax.jit(lambda *args: solver.step(*args))
    for name in SOLVERS:
        sigmas = flow.sigmas(6, 0.8)
        state = solver.start(jnp.ones((1, 4)))
        for row in solver_table(name, sigmas):
            state = fresh(state, 0.5 * state.x, row)
    assert fresh._cache_size() == 1


def test_state_is_float32_for_low_precision_input():
    state = solver.start(jnp.ones((1, 4), jnp.bfloat16))
    state = step(state, jnp.ones((1, 4), jnp.bfloat16), solver_table("euler", np.r_[1, 0.5, 0])[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


def test_unknown_solvers_are_refused():
    with pytest.raises(ValueError, match="'heun' is unknown; choose one of unipc"):
        solver_table("heun", np.r_[1, 0])
    with pytest.raises(ValueError, match="'bh3' is unknown"):
        unipc.table(np.r_[1, 0], "bh3")
