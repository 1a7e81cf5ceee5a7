"""Whole videos of Helios and Wan, converted and sampled by the product, against diffusers' runs.

The random draws of the recorded runs are given to the sampler in the order in which diffusers made
them.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file

from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.generation import anchor
from framepack_jax.generation.crossfade import to_uint8
from framepack_jax.generation.options import VideoOptions
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.generation.request import source_from_frames
from framepack_jax.generation.settings import Settings
from framepack_jax.video import load_image
from tests.fixtures.paths import GOLDEN
from tests.fixtures.torch_reference import relative_error

HELIOS = GOLDEN / "helios"
RUNS = (
    "base_t2v", "base_i2v", "base_v2v", "variant_t2v", "mid_t2v", "mid_dynamic_t2v",
    "distilled_t2v", "distilled_i2v", "distilled_dynamic_t2v", "wan_t2v",
)  # fmt: skip


def channels_last(x: np.ndarray) -> np.ndarray:
    return rearrange(x, "b c t h w -> b t h w c") if x.ndim == 5 else x


@pytest.fixture(scope="module")
def reference() -> dict:
    return json.loads((HELIOS / "reference.json").read_text())


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return load_file(HELIOS / "reference.safetensors")


def assemble(name: str, run: dict, folder: Path) -> Path:
    """The pipeline folder of a run, as the README of the goldens says."""
    shutil.copytree(HELIOS / "pipeline", folder)
    model = name.rpartition("_")[0]
    if transformer := run.get("transformer"):
        shutil.rmtree(folder / "transformer")
        shutil.copytree(HELIOS / transformer, folder / "transformer")
    index = model.partition("_")[0]
    if (HELIOS / f"model_index_{index}.json").exists():
        shutil.copy(HELIOS / f"model_index_{index}.json", folder / "model_index.json")
        shutil.rmtree(folder / "scheduler")
        shutil.copytree(HELIOS / f"scheduler_{model}", folder / "scheduler")
    return folder


class RecordedDraws:
    """The random draws of a run in diffusers' order, each of the kind and shape that is recorded
    with it; stands for `anchor.Draws`."""

    def __init__(self, name: str, run: dict, recorded: dict[str, np.ndarray]) -> None:
        self.draws = iter(
            [(kind, tuple(shape), recorded[f"{name}/draw{i:02}"])
             for i, (kind, shape) in enumerate(run["draws"])]
        )  # fmt: skip

    def take(self, kind: str) -> np.ndarray:
        recorded_kind, shape, value = next(self.draws)
        assert (recorded_kind, shape) == (kind, value.shape)
        return channels_last(value)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        value = self.take("normal")
        assert value.shape == shape
        return value

    def uniform(self, count: int) -> np.ndarray:
        value = self.take("uniform")
        assert value.shape == (count,)
        return value

    def noise(self, stages: int) -> list[np.ndarray]:
        """The noise of a section's stages: the first is independent, the others come in blocks."""
        return [self.take("block" if i else "normal") for i in range(stages)]


def open_run(name: str, run: dict, folder: Path, text_tokens: int) -> FramePack:
    if name == "wan_t2v":
        schedule = f"g{run['latents']}"
    else:
        long, mid, short = run["history_sizes"]
        schedule = f"f1k1_x_f{long}k4f{mid}k2f{short}k1_g{run['chunk']}"
    output = folder / "bundle"
    pipeline = assemble(name, run, folder / "pipeline")
    make_bundle(
        BundleRequest(
            output=str(output), pipeline=pipeline, schedule=schedule, text_tokens=text_tokens
        )
    )
    pipe = FramePack.load(output)
    recipe = pipe.sampling.recipe
    assert recipe.zero_star is run.get("cfg_zero_star", False)
    if run.get("use_zero_init") is False:
        recipe = dataclasses.replace(recipe, zero_steps=0)
    elif run.get("cfg_zero_star"):
        # diffusers leaves out steps up to this index.
        assert recipe.zero_steps == run["zero_steps"] + 1
    recipe = dataclasses.replace(recipe, double_first=run.get("amplify_first_chunk", False))
    return dataclasses.replace(pipe, sampling=dataclasses.replace(pipe.sampling, recipe=recipe))


@pytest.mark.golden
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_diffusers(name: str, reference, recorded, tmp_path) -> None:
    run = reference["runs"][name]
    pipe = open_run(name, run, tmp_path, recorded["ids"].shape[1])
    draws = RecordedDraws(name, run, recorded)
    size = reference["height"], reference["width"]
    picture = load_image(HELIOS / "image.png")
    source = None
    if "video" in run:
        frames = [np.roll(picture, 2 * i, axis=1) for i in range(21)]
        source = source_from_frames(pipe.geometry, frames, *size)
    chunks = 1 if name == "wan_t2v" else run["chunks"]
    options = VideoOptions(
        negative_prompt=reference["negative"], source_video=source, sections=chunks,
        height=size[0], width=size[1],
    )  # fmt: skip
    image = picture if run.get("image") else None
    request, layout = options.prepare(pipe.geometry, image, reference["prompt"])
    steps = tuple(run["pyramid_steps"]) if "pyramid_steps" in run else run["steps"]
    settings = Settings(steps=steps, cfg_scale=run["guidance_scale"])

    given = {}
    if pipe.sampling.anchor_apart:
        known = anchor.given_latents(pipe, request, draws)
        given = {position: latents[None] for position, latents in known.items()}
    inputs = pipe.encode([request], layout, settings, given=given)
    stages = pipe.sampling.recipe.stages
    noise = [draws.noise(stages) for _ in layout.plan]
    assert next(draws.draws, None) is None
    made = pipe.sample(layout.plan, inputs, settings, noise=noise)
    clips = []
    for i, (section, start, clip, timeline) in enumerate(
        pipe.decode(layout.plan, made, kept=layout.kept)
    ):
        latents = timeline.read(section.targets) * pipe.latent_std + pipe.latent_mean
        expected = channels_last(recorded[f"{name}/decoded_latents{i}"])
        assert relative_error(latents, expected) < 5e-4
        assert start == layout.kept + i * clip.shape[1]
        clips.append(np.asarray(clip)[0] / 2 + 0.5)
    # diffusers cuts the whole to 4 k + 1 frames.
    frames = np.concatenate(clips)[: run["frames"][0]]
    assert list(frames.shape) == run["frames"]
    assert layout.frames == layout.kept + sum(map(len, clips))
    expected = recorded[f"{name}/frames_every_3rd"].astype(np.float32)
    assert np.abs(frames[::3] - expected).max() < 2e-3
    assert to_uint8(clip, *size).shape[2:] == (*size, 3)
