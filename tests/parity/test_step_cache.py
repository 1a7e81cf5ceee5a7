"""Step caches: against the release (golden/) and live diffusers, and what they promise."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, HunyuanVideoFramepackTransformer3DModel
from einops import rearrange
from safetensors.numpy import load_file

from framepack_jax import packing
from framepack_jax.conversion import engine, tables, weight_files
from framepack_jax.diffusion import flow, sampler, solver, solver_table
from framepack_jax.diffusion.given_frames import GivenFrames
from framepack_jax.diffusion.step_cache import StepCacheConfig, first_block, run_or_skip, start, tea
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.embed import Conditions
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.hunyuan.step_cache_hooks import TEACACHE
from framepack_jax.models.params import stack_layers
from tests.fixtures.torch_reference import convert_module, randomize, relative_error

TAG = "teacache_n1_w3_s25"
WINDOW, SIZE, TEXT = 2, 6, 8
KERNELS = {"k4": 16, "k2": 2, "k1": 2}
FRAME_INDICES = {"k4": range(10, 26), "k2": (8, 9), "k1": (0, 7), "target": (4, 5)}
STEPS = 16
SIGMAS = flow.sigmas(STEPS, 1.0)
EULER = solver_table("euler", SIGMAS)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """More threads only wait for each other at these sizes, for seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def module() -> HunyuanVideoFramepackTransformer3DModel:
    return randomize(
        HunyuanVideoFramepackTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, num_layers=3, num_single_layers=2,
            mlp_ratio=3.0, text_embed_dim=16, pooled_projection_dim=12, rope_axes_dim=(2, 4, 6),
            image_proj_dim=20, has_image_proj=True, has_clean_x_embedder=True,
        ),
        seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def network(module, tmp_path_factory):
    cfg, params = convert_module(module, "transformer", tmp_path_factory.mktemp("dit"))
    return cfg, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Inputs of a batch of two; `negative_*` is a second prompt."""
    random = np.random.default_rng(1)
    shapes = {
        "noise": (2, WINDOW, SIZE, SIZE, 16),
        **{kernel: (2, frames, SIZE, SIZE, 16) for kernel, frames in KERNELS.items()},
        "text": (2, TEXT, 16), "pooled": (2, 12), "image": (2, 4, 20),
        "negative_text": (2, TEXT, 16), "negative_pooled": (2, 12),
    }  # fmt: skip
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def context_of(arrays) -> packing.PackedContext:
    def indices(name: str) -> np.ndarray:
        return np.tile(np.asarray(FRAME_INDICES[name], np.int32), (len(arrays["noise"]), 1))

    return packing.PackedContext(
        latents=tuple(arrays[kernel] for kernel in KERNELS),
        indices=tuple(indices(kernel) for kernel in KERNELS),
        target_indices=indices("target"),
        kernels=tuple(KERNELS),
    )


def conditions_of(arrays, prefix: str = "") -> Conditions:
    text, pooled = arrays[f"{prefix}text"], arrays[f"{prefix}pooled"]
    guidance = np.full(len(text), 6.0, np.float32)
    return Conditions(text, np.ones(text.shape[:2], bool), pooled, arrays["image"], guidance)


def denoise(network, arrays, cache: StepCacheConfig | None, prefix: str = "", **options):
    context, conditions = context_of(arrays), conditions_of(arrays, prefix)
    scales = {name: options.pop(name) for name in ("cfg_scale", "dtype") if name in options}
    settings = sampler.SamplerSettings(SIGMAS, EULER, cache=cache, **scales)
    return sampler.denoise(
        TRANSFORMER, *network, arrays["noise"], settings, context, conditions, **options
    )


def alone(arrays, sample: int):
    return {name: x[sample : sample + 1] for name, x in arrays.items()}


@pytest.mark.golden
def test_teacache_equals_the_release(golden) -> None:
    checkpoint = weight_files.open_checkpoint(golden / "transformer")
    plan = engine.make_job(tables.recognise(checkpoint, "transformer"))
    network = plan.cfg, stack_layers(dict(plan.leaves()), TRANSFORMER.stacks)
    reference = {
        name: rearrange(x, "b c t h w -> b t h w c") if x.ndim == 5 else x
        for name, x in load_file(golden / "pipeline.safetensors").items()
    }
    schedule = "f1k1_x_g3_f1k1f2k2f16k4_td"
    (section,) = packing.plan(packing.parse(schedule), 1)
    timeline = packing.Timeline(4, reference["start_latent"].shape[2:], 1)
    timeline.write(range(1), reference["start_latent"])
    conditions = Conditions(
        reference["prompt_embeds"], reference["prompt_mask"].astype(bool), reference["pooled"],
        reference["image_embeds"], np.full(1, 10.0, np.float32),
    )  # fmt: skip
    noise, ran = reference[f"{TAG}/noise0"], reference[f"{TAG}/blocks_run_per_step0"]
    tokens = packing.target_tokens(packing.parse(schedule), *noise.shape[2:4])
    sigmas = flow.sigmas(len(ran), flow.shift_mu(tokens))
    settings = sampler.SamplerSettings(
        sigmas, solver_table("unipc", sigmas), cache=StepCacheConfig("tea")
    )
    context = packing.read_context(section, timeline)
    done = sampler.denoise(TRANSFORMER, *network, noise, settings, context, conditions)
    np.testing.assert_array_equal(done.blocks_run[:, 0, 0].astype(int), ran)
    assert relative_error(done.latents, reference[f"{TAG}/section0"]) < 5e-4
    timeline.write(section.targets, done.latents)
    assert relative_error(timeline.latents, reference[f"{TAG}/latents"]) < 5e-4


@torch.no_grad()
def diffusers_run(module, arrays, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(latents, blocks run (steps, passes)) of Euler's method around diffusers' network."""

    def video(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(rearrange(x, "b t h w c -> b c t h w").copy())

    history = {
        "latents_clean": video(arrays["k1"]), "latents_history_2x": video(arrays["k2"]),
        "latents_history_4x": video(arrays["k4"]),
        "indices_latents_clean": torch.tensor(FRAME_INDICES["k1"]),
        "indices_latents_history_2x": torch.tensor(FRAME_INDICES["k2"]),
        "indices_latents_history_4x": torch.tensor(FRAME_INDICES["k4"]),
    }  # fmt: skip
    calls = []
    inner = module.single_transformer_blocks[0].attn
    hook = inner.register_forward_hook(lambda *_: calls.append(1))

    def velocity(x: torch.Tensor, sigma: float, prefix: str) -> torch.Tensor:
        with module.cache_context(prefix or "positive"):
            return module(
                x,
                torch.tensor([1000 * sigma], dtype=torch.float32),
                torch.from_numpy(arrays[f"{prefix}text"]),
                torch.ones(1, TEXT),
                torch.from_numpy(arrays[f"{prefix}pooled"]),
                torch.from_numpy(arrays["image"]),
                torch.tensor(FRAME_INDICES["target"]),
                guidance=torch.tensor([6000.0]),
                return_dict=False,
                **history,
            )[0]

    x, ran = video(arrays["noise"]), []
    for sigma, then in itertools.pairwise(SIGMAS):
        velocities, counts = [], [len(calls)]
        for prefix in ("", "negative_"):
            velocities.append(velocity(x, sigma, prefix))
            counts.append(len(calls))
        positive, negative = velocities
        x = x + (then - sigma) * (negative + scale * (positive - negative))
        ran.append(np.diff(counts))
    hook.remove()
    return rearrange(x.numpy(), "b c t h w -> b t h w c"), np.array(ran, bool)


def test_first_block_equals_diffusers(module, network, arrays) -> None:
    """With guidance, so that two passes decide for themselves."""
    inputs, threshold, scale = alone(arrays, 0), 0.6, 2.0
    module.enable_cache(FirstBlockCacheConfig(threshold))
    latents, ran = diffusers_run(module, inputs, scale)
    module.disable_cache()
    negative, config = conditions_of(inputs, "negative_"), StepCacheConfig("first-block", threshold)
    done = denoise(network, inputs, config, negative=negative, cfg_scale=scale)
    np.testing.assert_array_equal(done.blocks_run[:, :, 0], ran)
    assert relative_error(done.latents, latents) < 2e-4
    assert (ran.sum(axis=0) > 2).all() and (ran.sum(axis=0) < STEPS - 2).all()
    assert not np.array_equal(ran[:, 0], ran[:, 1])


@pytest.mark.parametrize(("scale", "kept", "prefix"), [(1.0, 0, ""), (0.0, 1, "negative_")])
def test_passes_do_not_share_a_cache(network, arrays, scale, kept, prefix) -> None:
    """At scale 1 the negative pass changes nothing, at 0 the positive: the other is by itself."""
    inputs, config = alone(arrays, 0), StepCacheConfig("tea")
    both = denoise(
        network, inputs, config, negative=conditions_of(inputs, "negative_"), cfg_scale=scale
    )
    single = denoise(network, inputs, config, prefix)
    np.testing.assert_array_equal(both.blocks_run[:, kept], single.blocks_run[:, 0])
    assert relative_error(both.latents, single.latents) < 1e-4
    assert not np.array_equal(both.blocks_run[:, 0], both.blocks_run[:, 1])


def test_samples_of_a_batch_decide_for_themselves(network, arrays) -> None:
    config = StepCacheConfig("tea", 0.2)
    both = denoise(network, arrays, config)
    for sample in (0, 1):
        single = denoise(network, alone(arrays, sample), config)
        np.testing.assert_array_equal(both.blocks_run[:, :, sample], single.blocks_run[:, :, 0])
        assert relative_error(both.latents[sample], single.latents[0]) < 1e-5
    first, second = both.blocks_run[:, 0, 0], both.blocks_run[:, 0, 1]
    assert (first & ~second).any() and (second & ~first).any() and (~first & ~second).any()


@pytest.mark.parametrize("kind", ["tea", "first-block"])
def test_a_sample_that_skips_keeps_its_own_residual(kind) -> None:
    """Signals change in turn, so that the blocks run for one sample while the other skips."""
    random = np.random.default_rng(0)
    img = random.standard_normal((6, 2, 3, 4), np.float32)
    first, second = np.array([[1, 9, 9, 1, 1, 5], [1, 1, 1, 7, 7, 7]], np.float32)
    signals = np.stack([first, second], axis=1)[:, :, None, None] * np.ones_like(img)

    def outputs(samples: slice) -> tuple[np.ndarray, np.ndarray]:
        state, out, needs = start(img[0, samples].shape, jnp.float32), [], []
        for i in range(len(img)):
            signal = jnp.asarray(signals[i, samples])
            if kind == "tea":
                need, state = tea(state, signal, np.bool_(i == 0), 0.5, (1.0, 0.0))
            else:
                need, state = first_block(state, signal, np.bool_(i == 0), 0.5)
            blocks = functools.partial(jnp.multiply, i + 2)
            x, state = run_or_skip(state, need, img[i, samples], blocks)
            out.append(x)
            needs.append(need)
        return np.stack(out), np.stack(needs)

    both, needs = outputs(slice(None))
    assert needs.tolist() == np.array([[1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 0, 0]], bool).T.tolist()
    for sample in (0, 1):
        single, _ = outputs(slice(sample, sample + 1))
        np.testing.assert_allclose(both[:, sample], single[:, 0], rtol=1e-6)
    # The blocks add (i + 1) img at step i. They ran for the second sample at step 0, not at 1.
    np.testing.assert_allclose(both[2, 1], img[2, 1] + img[0, 1], rtol=1e-5)


@pytest.mark.parametrize(("kind", "least"), [("tea", [0, STEPS - 1]), ("first-block", [0])])
def test_thresholds_from_all_to_nothing(network, arrays, kind, least) -> None:
    inputs = alone(arrays, 0)
    guided = {"negative": conditions_of(inputs, "negative_"), "cfg_scale": 2.0}
    always, never = (
        denoise(network, inputs, StepCacheConfig(kind, t), **guided) for t in (1e-9, 1e9)
    )
    without = denoise(network, inputs, None, **guided)
    assert always.blocks_run.all() and without.blocks_run is None
    assert relative_error(always.latents, without.latents) < 1e-6
    for ran in never.blocks_run[:, :, 0].T:
        assert np.flatnonzero(ran).tolist() == least
    assert relative_error(never.latents, always.latents) > 1e-3


@pytest.mark.parametrize("kind", ["tea", "first-block"])
def test_what_slow_changes_are_measured_from(kind) -> None:
    """Tea: the step before, whether or not it ran: 0.1 + 0.091 + 0.083 > 0.25. First block: the
    last step that ran: 0.3 > 0.25. Afterwards 0.077 + 0.071 + 0.067, and 0.23."""
    state, needs = start((1, 1, 1), jnp.float32), []
    for i in range(7):
        signal = jnp.full((1, 1, 1), 1 + 0.1 * i)
        if kind == "tea":
            need, state = tea(state, signal, np.bool_(i == 0), 0.25, (1.0, 0.0))
        else:
            need, state = first_block(state, signal, np.bool_(i == 0), 0.25)
        needs.append(bool(need[0]))
    assert needs == [True, False, False, True, False, False, False]


def test_teacache_goes_on_after_a_change_that_is_no_number() -> None:
    """Once 0 / 0 entered the sum, no sum would ever reach the threshold again."""
    state = start((1, 2, 3), jnp.float32)
    need, state = tea(state, state.signal, jnp.array(False), 0.15, TEACACHE)
    assert need.all() and state.total == 0


def abstract(tree, dtype=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)


def lowered(cfg, params, arrays, kind: str | None, dtype: str, passes: int = 1):
    """`sampler.step` for one sample, from shapes alone."""
    arrays, scalar = alone(arrays, 0), jax.ShapeDtypeStruct((), jnp.float32)
    noise = abstract(arrays["noise"])
    negative = conditions_of(arrays, "negative_") if passes == 2 else None
    request = abstract(
        sampler.SectionInputs(
            context_of(arrays), conditions_of(arrays), negative,
            GivenFrames(noise, jax.ShapeDtypeStruct(noise.shape[:2], bool)),
            scalar, scalar, scalar if kind else None,
        )
    )  # fmt: skip
    at = sampler.At(
        scalar, abstract(EULER[0], np.float32), jax.ShapeDtypeStruct((), bool) if kind else None
    )
    program = sampler.StepProgram(TRANSFORMER, cfg, dtype, kind)
    fixed = program, abstract(params, jnp.dtype(dtype)), request
    memory = jax.eval_shape(lambda: sampler.start_memory(*fixed, noise))
    return sampler.step.lower(*fixed, at, jax.eval_shape(solver.start, noise), memory)


def sizes(lowered) -> tuple[int, int]:
    return len(jax.tree.leaves(lowered.args_info)), len(jax.tree.leaves(lowered.out_info))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", ["tea", "first-block"])
def test_without_a_cache_none_of_it_is_in_the_program(network, arrays, kind, passes) -> None:
    without = lowered(*network, arrays, None, "bfloat16", passes)
    assert "stablehlo.case" not in without.as_text() and "stablehlo.if" not in without.as_text()
    cached = lowered(*network, arrays, kind, "bfloat16", passes)
    assert cached.as_text().count("stablehlo.case") == passes
    # Threshold and whether blocks are forced; three arrays of state a pass; who ran the blocks.
    assert np.subtract(sizes(cached), sizes(without)).tolist() == [2 + 3 * passes, 1 + 3 * passes]
    assert sizes(without)[1] == len(solver.start(jnp.zeros(1)).history) + 3


def test_the_state_of_a_cache_keeps_its_types(network, arrays) -> None:
    """Otherwise every section compiled twice, and the second program held more."""
    program = lowered(*network, arrays, "first-block", "bfloat16")
    before, after = program.args_info[0][-1][0], program.out_info[1][0]
    for old, new in zip(before, after, strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert [x.dtype for x in after] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


def test_parameters_are_not_copied(network, arrays, compiled_anew) -> None:
    cfg = dataclasses.replace(network[0], heads=4, double_layers=12)
    params = jax.eval_shape(functools.partial(transformer.init, cfg), jax.random.key(0))
    size = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(params["double"]))
    fast = {"xla_backend_optimization_level": 0}
    compiled = lowered(cfg, params, arrays, "first-block", "float32").compile(fast)
    assert compiled.memory_analysis().temp_size_in_bytes < size / 2


def test_thresholds_are_those_of_the_originals() -> None:
    assert StepCacheConfig("tea") == StepCacheConfig("tea", 0.15)
    assert StepCacheConfig("first-block").threshold == FirstBlockCacheConfig().threshold


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "mag"}, "'mag'.*tea, first-block"),
        ({"threshold": 0.0}, "= 0.0.*above 0"),
        ({"threshold": -1.0}, "= -1.0"),
        ({"threshold": float("nan")}, "= nan"),
        ({"threshold": float("inf")}, "= inf"),
    ],
)
def test_impossible_configs(options, named) -> None:
    with pytest.raises(ValueError, match=named):
        StepCacheConfig(**options)
