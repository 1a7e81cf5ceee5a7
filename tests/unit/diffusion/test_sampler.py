"""The loop over a section: known latents, what is reported, and one program for all of it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import packing
from framepack_jax.diffusion import SOLVERS, flow, sampler, solver, solver_table
from framepack_jax.diffusion.given_frames import GivenFrames
from framepack_jax.diffusion.network import StepCacheHooks
from framepack_jax.diffusion.step_cache import StepCacheConfig
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from tests.fixtures.torch_reference import relative_error

SHAPE = (2, 3, 4, 4, 2)
STEPS = 7
SIGMAS = flow.sigmas(STEPS, 1.0)
KNOWN = np.array([False, True, False])


class Network:
    """A network without weights; sample 1 is not finite below the noise level `params`."""

    @staticmethod
    def velocity(cfg, params, x, sigma, context, conditions, dtype):
        sigma = sigma[:, None, None, None, None]
        v = jnp.tanh(x + conditions) - 0.3 * sigma * jnp.cos(3 * x) + 0.1 * x.mean(1, keepdims=True)
        second = jnp.arange(len(x))[:, None, None, None, None] == 1
        return jnp.where(second & (sigma < params), jnp.nan, v)

    @staticmethod
    def embed_tokens(cfg, params, x, sigma, context, conditions, dtype):
        img = x.reshape(len(x), -1, x.shape[-1])
        rope = valid = jnp.zeros(())
        return transformer.Tokens(img, conditions, sigma, rope, valid)

    @staticmethod
    def block_input(cfg, params, tokens):
        return tokens.img

    @staticmethod
    def run_blocks(cfg, params, tokens, first):
        return jnp.tanh(tokens.img)

    @staticmethod
    def head(cfg, params, img, vec, shape):
        return img.reshape(shape)

    step_cache = StepCacheHooks(
        embed=embed_tokens,
        block_input=block_input,
        first_block=None,
        run_blocks=run_blocks,
        head=head,
        teacache=(0.0, 0.06),
    )


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE, np.float32)


@pytest.fixture
def target() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(SHAPE, np.float32)


def denoise(noise, params: float = -1.0, name: str = "unipc", sigmas=SIGMAS, **options):
    table, zero = solver_table(name, sigmas), jnp.zeros((1,) * 5)
    scales = {name: options.pop(name) for name in ("cfg_scale", "cache") if name in options}
    settings = sampler.SamplerSettings(sigmas, table, **scales)
    return sampler.denoise(Network, None, np.float32(params), noise, settings, (), zero, **options)


@pytest.mark.parametrize("name", SOLVERS)
def test_known_latents_are_the_result(noise, target, name) -> None:
    done = denoise(noise, name=name, given=GivenFrames(target, KNOWN))
    np.testing.assert_array_equal(done.latents[:, KNOWN], target[:, KNOWN])
    free = denoise(noise, name=name)
    assert relative_error(done.latents[:, ~KNOWN], free.latents[:, ~KNOWN]) > 1e-3
    assert relative_error(free.latents[:, KNOWN], target[:, KNOWN]) > 0.1


@pytest.mark.parametrize("name", SOLVERS)
def test_where_nothing_is_known_the_target_is_not_read(noise, name) -> None:
    done = denoise(noise, name=name, given=GivenFrames(np.full(SHAPE, np.nan), np.zeros(3, bool)))
    np.testing.assert_array_equal(done.latents, denoise(noise, name=name).latents)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_network_meets_known_latents_on_their_path(noise, target, name, monkeypatch) -> None:
    step, met = sampler.step, []

    def spy(*args):
        met.append(np.asarray(args[-2].x))
        return step(*args)

    monkeypatch.setattr(sampler, "step", spy)
    denoise(noise, name=name, given=GivenFrames(target, KNOWN))
    for x, sigma in zip(met, SIGMAS[:-1], strict=True):
        path = flow.interpolate(target, noise, sigma)
        np.testing.assert_allclose(x[:, KNOWN], path[:, KNOWN], atol=3e-6)
        assert sigma == 1 or relative_error(x[:, ~KNOWN], path[:, ~KNOWN]) > 1e-2


def test_samples_may_know_different_latents(noise, target) -> None:
    known = np.array([[True, False, False], [False, False, True]])
    done = denoise(noise, given=GivenFrames(target, known))
    np.testing.assert_array_equal(done.latents[known], target[known])
    assert (done.latents[~known] != target[~known]).all()


def test_what_is_not_finite_is_reported_for_its_sample(noise) -> None:
    done, healthy = denoise(noise, params=SIGMAS[3] + 1e-3), denoise(noise)
    assert done.finite_step.tolist() == [-1, 3]
    assert np.isnan(done.latents[1]).all()
    np.testing.assert_array_equal(done.latents[0], healthy.latents[0])
    assert healthy.finite_step.tolist() == [-1, -1] and healthy.blocks_run is None


def test_a_known_latent_that_is_not_finite_is_reported(noise, target) -> None:
    target[0, 1, 0, 0, 0] = np.inf
    assert denoise(noise, given=GivenFrames(target, KNOWN)).finite_step.tolist() == [0, -1]


@pytest.mark.parametrize("config", [None, StepCacheConfig("tea")])
def test_every_step_is_reported_one_late(noise, config, monkeypatch) -> None:
    step, events = sampler.step, []

    def spy(*args):
        events.append("step")
        return step(*args)

    monkeypatch.setattr(sampler, "step", spy)
    seen = []
    done = denoise(noise, cache=config, on_step=lambda *at: (events.append(at[0]), seen.append(at)))
    assert events == ["step", *itertools.chain(*(("step", i) for i in range(STEPS - 1))), STEPS - 1]
    # Held until now: no later step may use up what was handed out.
    x0 = [np.asarray(x) for _, x in seen]
    np.testing.assert_array_equal(x0[-1], done.latents)
    assert all((a != b).any() for a, b in itertools.pairwise(x0))


def test_predictions_are_those_of_the_steps(noise) -> None:
    seen = []
    denoise(noise, name="euler", on_step=lambda step, x0: seen.append(np.asarray(x0)))
    x = noise
    for x0, sigma, then in zip(seen, SIGMAS, SIGMAS[1:], strict=False):
        level = jnp.full(len(x), sigma)
        v = Network.velocity(None, -1.0, x, level, (), jnp.zeros((1,) * 5), None)
        np.testing.assert_allclose(x0, x - sigma * v, atol=1e-5)
        x = x + (then - sigma) * np.asarray(v)


def test_decisions_are_reported(noise) -> None:
    """The polynomial is 0.06 everywhere: the threshold is reached at every third step."""
    negative = jnp.ones((1,) * 5)
    done = denoise(noise, cache=StepCacheConfig("tea"), negative=negative, cfg_scale=2.0)
    assert done.blocks_run.shape == (STEPS, 2, 2)
    assert (done.blocks_run == np.array([1, 0, 0, 1, 0, 0, 1], bool)[:, None, None]).all()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((np.zeros(SHAPE[1:]), KNOWN), r"latents \(3, 4, 4, 2\)"),
        ((np.zeros(SHAPE), KNOWN[:2]), r"mask \(2,\).*\(3,\) or \(2, 3\)"),
    ],
)
def test_given_frames_that_do_not_fit_are_refused(noise, given, named) -> None:
    with pytest.raises(ValueError, match=named):
        denoise(noise, given=GivenFrames(*given))


def test_sigmas_of_another_table_are_refused() -> None:
    table = solver_table("euler", SIGMAS)
    with pytest.raises(ValueError, match="7 sigmas and 7 rows"):
        sampler.SamplerSettings(SIGMAS[:-1], table)


@pytest.fixture(scope="module")
def network():
    cfg = TransformerConfig(
        in_channels=4, out_channels=4, heads=2, head_dim=6, double_layers=2, single_layers=1,
        refiner_layers=1, text_dim=8, pooled_dim=8, image_dim=None, rope_axes=(2, 2, 2),
    )  # fmt: skip
    shapes = jax.eval_shape(functools.partial(transformer.init, cfg), jax.random.key(0))
    random = np.random.default_rng(0)
    weights = jax.tree.map(lambda p: 0.3 * random.standard_normal(p.shape, np.float32), shapes)
    return cfg, jax.device_put(weights)


def conditions() -> Conditions:
    text, valid = np.ones((1, 3, 8), np.float32), np.ones((1, 3), bool)
    return Conditions(text, valid, np.ones((1, 8), np.float32), None, np.ones(1))


@pytest.mark.parametrize("kind", [None, "tea", "first-block"])
def test_one_program_for_all_steps_and_sections(network, kind) -> None:
    """Whatever the noise levels, solver, guidance, known latents or threshold are."""
    schedule = "f1k1_x_g2_f1k1f2k2f16k4_td"
    plan = packing.plan(packing.parse(schedule), 3)
    timeline = packing.Timeline(1 + 2 * len(plan), (4, 4, 4), 1)
    timeline.write(range(1), np.ones((1, 1, 4, 4, 4), np.float32))
    sampler.step.clear_cache()
    for i, section in enumerate(plan):
        sigmas, config = flow.sigmas(2 + i, 1.0 + i), kind and StepCacheConfig(kind, 0.1 + i)
        noise = np.full((1, 2, 4, 4, 4), i + 1, np.float32)
        given = None if i else GivenFrames(noise, np.array([True, False]))
        table = solver_table(("unipc", "euler")[i % 2], sigmas)
        done = sampler.denoise(
            TRANSFORMER, *network, noise, sampler.SamplerSettings(sigmas, table, cache=config),
            packing.read_context(section, timeline), conditions(), given=given,
        )  # fmt: skip
        timeline.write(section.targets, done.latents)
    assert sampler.step._cache_size() == 1
    assert timeline.known.all() and np.isfinite(timeline.latents).all()


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False)])
def test_float32_means_float32(network, dtype, exact) -> None:
    x = jnp.zeros((1, 2, 4, 4, 4))
    context = packing.PackedContext((), (), jnp.zeros((1, 2), jnp.int32), ())
    request = sampler.SectionInputs(
        context,
        conditions(),
        None,
        GivenFrames(x, jnp.zeros((1, 2), bool)),
        jnp.ones(()),
        jnp.zeros(()),
        None,
    )
    at = sampler.At(jnp.ones(()), jnp.zeros(9), None)
    lowered = sampler.step.lower(
        sampler.StepProgram(TRANSFORMER, network[0], dtype),
        network[1],
        request,
        at,
        solver.start(x),
        (None,),
    )
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    # The head is exact whatever the type.
    assert sum("HIGHEST" in line for line in products) == (len(products) if exact else 2) > 1
