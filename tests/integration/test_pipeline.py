"""The section loop and decoding against the authors' sampler (golden/), and what they promise."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors import safe_open
from safetensors.numpy import load_file

from framepack_jax import bundle, packing
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.diffusion import sampler
from framepack_jax.generation.pipeline import FramePack, Inputs, Network, Settings
from framepack_jax.generation.results import NotFinite
from tests.fixtures.paths import GOLDEN
from tests.fixtures.torch_reference import relative_error

# Kind, sections, latent window, steps; guidance is 10, but 6 with classifier-free guidance.
TAG = re.compile(r"(inverted|f1)_n(\d+)_w(\d+)_s(\d+)(?:_cfg([\d.]+)_rescale([\d.]+))?")
SCHEDULES = {"inverted": "f1k1_x_g{}_f1k1f2k2f16k4_td", "f1": "f1k1_x_f16k4f2k2f1k1_g{}"}


def golden_tags() -> tuple[list[str], list[str]]:
    """Runs of the golden folder, and those among them that are decoded. Step caches aside."""
    with safe_open(GOLDEN / "pipeline.safetensors", "np") as file:
        names = set(file.keys())
    tags = sorted(name.removesuffix("/noise0") for name in names if name.endswith("/noise0"))
    tags = [tag for tag in tags if not tag.startswith("teacache")]
    return tags, [tag for tag in tags if f"{tag}/pixels" in names]


RUNS, DECODED = golden_tags()


def test_guidance_by_history_goes_from_no_history_to_history(networks, reference) -> None:
    """One Euler step is linear in the velocity, so the scale moves along a line. A scale of 1 is
    the plain pass, and 0 that without history; the anchor is read in both."""
    schedule = packing.parse("f1k1_x_g2_f2k2f16k4_td")
    pipe, plan = build(networks, schedule), packing.plan(schedule, 2)
    noise = [reference[f"inverted_n6_w2_s3/noise{i}"] for i in range(2)]

    def second(scale: float, blank: tuple[str, ...] = ()) -> np.ndarray:
        settings = Settings(
            1, sampler="euler", distilled_guidance=6.0, cfg_scale=scale, cfg_without="history"
        )
        sections = packing.drop_context(plan, blank)
        inputs = dataclasses.replace(inputs_of(pipe, reference, settings), negative=None)
        *_, (section, timeline) = pipe.sample(sections, inputs, settings, noise=noise)
        return timeline.read(section.targets)

    plain, without = second(1.0), second(1.0, ("k2", "k4"))
    assert np.abs(plain - without).max() > 1e-2
    np.testing.assert_allclose(second(0.0), without, atol=1e-5)
    np.testing.assert_allclose(second(3.0), without + 3 * (plain - without), atol=1e-4)


def test_noise_of_history_resumes_and_leaves_the_start_image(networks, reference) -> None:
    """The first section in forward order reads the start image alone. A factor of 0 is the plain
    pass bit for bit, also at batch two, and so is a run that resumes."""
    schedule = packing.parse("f1k1_x_f16k4f2k2f1k1_g2")
    pipe, plan = build(networks, schedule), packing.plan(schedule, 2)

    def sampled(factor: float, seeds: tuple[int, ...] = (7,), **resumed) -> list[np.ndarray]:
        settings = Settings(2, distilled_guidance=6.0, history_noise=factor)
        inputs = inputs_of(pipe, reference, settings)
        given = {0: np.repeat(inputs.given[0], len(seeds), axis=0)}
        inputs = dataclasses.replace(
            inputs, given=given,
            conditions=[jax.tree.map(lambda x: jnp.repeat(x, len(seeds), axis=0), inputs.of(0))],
        )  # fmt: skip
        made = pipe.sample(plan, inputs, settings, seeds=seeds, **resumed)
        return [timeline.read(section.targets) for section, timeline in made]

    plain, zero, noisy = sampled(0.0), sampled(-0.0), sampled(0.5)
    np.testing.assert_array_equal(plain, zero)
    assert relative_error(noisy[0], plain[0]) < 1e-5 < 1e-3 < relative_error(noisy[1], plain[1])
    timeline = pipe.timeline(plan, {0: reference["start_latent"][:, 0]})
    timeline.write(plan[0].targets, noisy[0])
    np.testing.assert_array_equal(sampled(0.5, timeline=timeline, done=1)[0], noisy[1])
    both = sampled(0.5, seeds=(3, 7))
    assert relative_error(both[1][1:], noisy[1]) < 1e-5


def run_of(tag: str) -> tuple[packing.Schedule, int, Settings]:
    """(schedule, sections, settings) that a tag stands for."""
    kind, sections, window, steps, cfg, rescale = TAG.fullmatch(tag).groups()
    settings = Settings(steps=int(steps))
    if cfg:
        settings = Settings(
            int(steps), distilled_guidance=6.0, cfg_scale=float(cfg), cfg_rescale=float(rescale)
        )
    return packing.parse(SCHEDULES[kind].format(window)), int(sections), settings


@pytest.fixture(scope="module")
def reference(golden):
    """Arrays of pipeline.safetensors; videos and latents channels last."""
    arrays = load_file(golden / "pipeline.safetensors")
    return {
        name: rearrange(x, "b c t h w -> b t h w c") if x.ndim == 5 else x
        for name, x in arrays.items()
    }


@pytest.fixture(scope="module")
def networks(golden, tmp_path_factory):
    """The golden transformer and VAE, converted and loaded."""
    root = tmp_path_factory.mktemp("golden_bundle") / "bundle"
    flags = BundleRequest(output=str(root), transformer=golden / "transformer", vae=golden / "vae")
    manifest = make_bundle(flags)

    def network(role: str) -> Network:
        params = bundle.load_params(root, manifest, role)
        return Network(*bundle.role_config(manifest, role), params)

    return network("transformer"), network("vae"), manifest


def build(networks, schedule: packing.Schedule, **options) -> FramePack:
    transformer, vae, manifest = networks
    return FramePack(
        transformer=transformer,
        vae=vae,
        encoders=None,
        latent_mean=np.asarray(manifest.latent_mean, np.float32),
        latent_std=np.asarray(manifest.latent_std, np.float32),
        schedule=schedule,
        **options,
    )


def inputs_of(pipe: FramePack, reference, settings: Settings) -> Inputs:
    def conditions(prefix: str):
        return pipe.transformer.spec.conditions(
            reference[f"{prefix}prompt_embeds"],
            reference[f"{prefix}prompt_mask"].astype(bool),
            reference[f"{prefix}pooled"],
            reference["image_embeds"],
            jnp.full(1, settings.distilled_guidance, jnp.float32),
        )

    negative = conditions("neg_") if settings.cfg_scale != 1 else None
    return Inputs([conditions("")], negative, {0: reference["start_latent"][:, 0]})


def run(networks, reference, tag: str):
    schedule, sections, settings = run_of(tag)
    pipe = build(networks, schedule)
    plan = packing.plan(schedule, sections)
    noise = [reference[f"{tag}/noise{i}"] for i in range(sections)]
    made = pipe.sample(plan, inputs_of(pipe, reference, settings), settings, noise=noise)
    return pipe, plan, made


@pytest.mark.golden
def test_the_golden_folder_has_runs_of_every_sort() -> None:
    assert {tag.split("_")[0] for tag in RUNS} == {"inverted", "f1"} and len(DECODED) > 1
    assert any("cfg" in tag for tag in RUNS)


@pytest.mark.golden
@pytest.mark.parametrize("tag", RUNS)
def test_sections_equal_the_release(networks, reference, tag: str) -> None:
    _, plan, made = run(networks, reference, tag)
    for i, (section, timeline) in enumerate(made):
        ours, theirs = timeline.read(section.targets), reference[f"{tag}/section{i}"]
        assert relative_error(ours, theirs) < 2e-4, f"section {i}"
    assert i + 1 == len(plan)
    assert relative_error(timeline.latents, reference[f"{tag}/latents"]) < 2e-4


@pytest.mark.golden
@pytest.mark.parametrize("tag", DECODED)
def test_pixels_equal_the_release(networks, reference, tag: str) -> None:
    pipe, plan, made = run(networks, reference, tag)
    spans = [(start, np.asarray(frames)) for _, start, frames, _ in pipe.decode(plan, made)]
    video = np.concatenate([frames for _, frames in sorted(spans, key=lambda s: s[0])], axis=1)
    assert np.abs(video - reference[f"{tag}/pixels"].astype(np.float32)).max() < 5e-3
    covered = sorted(itertools.chain(*(range(s, s + f.shape[1]) for s, f in spans)))
    assert covered == list(range(video.shape[1]))


@pytest.mark.golden
def test_one_program_for_all_steps_and_sections(networks, reference) -> None:
    sampler.step.clear_cache()
    for schedule in SCHEDULES.values():
        pipe, settings = build(networks, packing.parse(schedule.format(2))), Settings(steps=3)
        plan = packing.plan(pipe.schedule, 3)
        list(pipe.sample(plan, inputs_of(pipe, reference, settings), settings))
    # Both schedules pack their groups in the same sequence, so that they even share it.
    assert sampler.step._cache_size() == 1


@pytest.mark.golden
def test_vanilla_is_f1_without_its_anchor(networks, reference) -> None:
    """There is no release to compare with. Frame indices are one lower, as the anchor had 0."""
    schedule, settings = packing.parse("td_f16k4f2k2f1k1_g2"), Settings(steps=2)
    pipe = build(networks, schedule)
    plan = packing.plan(schedule, 2)
    inputs = inputs_of(pipe, reference, settings)
    *_, (_, timeline) = pipe.sample(plan, inputs, settings)
    assert timeline.known.all() and np.isfinite(timeline.latents).all()
    f1 = packing.plan(packing.parse("f1k1_x_f16k4f2k2f1k1_g2"), 2)
    for ours, theirs in zip(plan, f1, strict=True):
        assert ours.targets == theirs.targets and ours.decode == theirs.decode
        rest = [group for group in theirs.groups if group.indices != (0,)]
        assert [group.reads for group in ours.groups] == [group.reads for group in rest]
        shifted = [tuple(i - 1 for i in group.indices) for group in rest]
        assert [group.indices for group in ours.groups] == shifted


@pytest.mark.golden
def test_a_batch_equals_its_samples(networks, reference) -> None:
    """Prompts of different lengths, side by side, change nothing."""
    schedule, sections, settings = packing.parse("f1k1_x_g2_f1k1f2k2f16k4_td"), 2, Settings(steps=2)
    pipe = build(networks, schedule)
    plan = packing.plan(schedule, sections)
    first = inputs_of(pipe, reference, settings)
    short = np.arange(20)[None, :] < 7
    other = first.conditions[0].replace(text_valid=short)
    second = Inputs([other], None, {0: first.given[0] + 0.5})
    both = jax.tree.map(lambda *x: np.concatenate(x), vars(first), vars(second))
    noise = np.random.default_rng(0).standard_normal((sections, 2, 2, 10, 14, 16), np.float32)

    def latents(inputs: Inputs, noise: np.ndarray) -> np.ndarray:
        return list(pipe.sample(plan, inputs, settings, noise=noise))[-1][1].latents

    together = latents(Inputs(**both), noise)
    for i, inputs in enumerate((first, second)):
        alone = latents(inputs, noise[:, i : i + 1])
        assert relative_error(together[i : i + 1], alone) < 1e-5
    assert relative_error(together[:1], together[1:]) > 1e-2


@pytest.mark.golden
def test_noise_of_a_section_does_not_depend_on_the_others(networks, reference) -> None:
    schedule, settings = packing.parse("f1k1_x_f16k4f2k2f1k1_g2"), Settings(steps=1)
    pipe = build(networks, schedule)
    first = [
        next(pipe.sample(packing.plan(schedule, n), inputs, settings, seeds=[3]))
        for n in (1, 4)
        for inputs in [inputs_of(pipe, reference, settings)]
    ]
    (section, short), (_, long) = first
    np.testing.assert_array_equal(short.read(section.targets), long.read(section.targets))


@pytest.mark.golden
def test_not_finite_is_named(networks, reference) -> None:
    schedule, settings = packing.parse("f1k1_x_f16k4f2k2f1k1_g2"), Settings(steps=3)
    pipe = build(networks, schedule)
    plan = packing.plan(schedule, 2)
    noise = np.zeros((2, 1, 2, 10, 14, 16), np.float32)
    noise[1, 0, 0, 0, 0, 0] = np.nan
    made = pipe.sample(plan, inputs_of(pipe, reference, settings), settings, noise=noise)
    next(made)
    with pytest.raises(NotFinite, match=r"section 2, step 1 of 3.*float32"):
        next(made)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"sampler": "heun"}, "'heun'"),
        ({"cfg_rescale": 1.5}, "cfg_rescale = 1.5"),
        ({"history_noise": 1.5}, "history_noise = 1.5"),
    ],
)
def test_impossible_settings(options, named) -> None:
    with pytest.raises(ValueError, match=named):
        Settings(**options)
