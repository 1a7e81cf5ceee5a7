"""Sections of Helios and Wan by their recipes, against recorded runs of diffusers."""

import json

import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file

from framepack_jax import packing
from framepack_jax.conversion import engine, tables, weight_files
from framepack_jax.diffusion import section
from framepack_jax.diffusion.recipe import Recipe
from framepack_jax.models.params import stack_layers
from framepack_jax.models.wan.spec import TRANSFORMER
from framepack_jax.packing import Timeline
from tests.fixtures.paths import GOLDEN
from tests.fixtures.torch_reference import relative_error

HELIOS = GOLDEN / "helios"
BASE = Recipe(solver="unipc-flow", highest=0.999, max_shift=None)
MID = Recipe(
    solver="unipc-flow", shift="none", stages=3, whole_times=True, zero_star=True, zero_steps=2
)
DISTILLED = Recipe(solver="renoise", shift="none", stages=3, whole_times=True, double_first=True)
RECIPES = {
    "base_t2v": BASE,
    "variant_t2v": BASE,
    "mid_t2v": MID,
    "mid_dynamic_t2v": Recipe(
        solver="unipc-flow", max_shift=None, stages=3, whole_times=True, zero_star=True
    ),
    "distilled_t2v": DISTILLED,
    "distilled_dynamic_t2v": Recipe(
        solver="renoise",
        max_shift=None,
        exponential=False,
        stages=3,
        whole_times=True,
        double_first=True,
    ),
    "wan_t2v": Recipe(
        solver="unipc-flow", lowest=0.001, shift="fixed", shift_factor=3.0, whole_times=True
    ),
}


def last(x: np.ndarray) -> np.ndarray:
    return rearrange(x, "b c t h w -> b t h w c")


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return load_file(HELIOS / "reference.safetensors")


@pytest.fixture(scope="module")
def networks() -> dict:
    found = {}
    for name in ("pipeline/transformer", "transformer_variant", "wan_transformer"):
        checkpoint = weight_files.open_checkpoint(HELIOS / name)
        job = engine.make_job(tables.recognise(checkpoint, "transformer"))
        found[name] = job.cfg, stack_layers(dict(job.leaves()), TRANSFORMER.stacks)
    return found


@pytest.mark.golden
@pytest.mark.parametrize("name", RECIPES)
def test_latents_from_text(name: str, recorded, networks) -> None:
    run = json.loads((HELIOS / "reference.json").read_text())["runs"][name]
    recipe = RECIPES[name]
    wan = name.startswith("wan")
    cfg, params = networks[
        "wan_transformer" if wan else run.get("transformer", "pipeline/transformer")
    ]
    latents_of = json.loads((HELIOS / "pipeline" / "vae" / "config.json").read_text())
    mean, std = (np.array(latents_of[f"latents_{n}"], np.float32) for n in ("mean", "std"))
    draws = iter(last(recorded[f"{name}/draw{i:02}"]) for i in range(len(run["draws"])))
    texts = (
        TRANSFORMER.conditions(recorded["prompt_embeds"][:1]),
        TRANSFORMER.conditions(recorded["prompt_embeds"][1:]),
    )
    chunk = run["draws"][0][1][2]
    schedule = packing.parse(f"g{chunk}" if wan else f"f1k1_x_f16k4f2k2f1k1_g{chunk}")
    plan = packing.plan(schedule, 1 if wan else run["chunks"], before=0, alone=True)
    rows, columns = run["draws"][0][1][3:]
    timeline = Timeline(packing.length(plan), (rows, columns, 16))
    scale = run["guidance_scale"]
    for i, each in enumerate(plan):
        steps = tuple(run.get("pyramid_steps") or [run["steps"]])
        if recipe.double_first and run["amplify_first_chunk"] and i == 0:
            steps = tuple(2 * n for n in steps)
        how = section.SectionSettings(steps, cfg_scale=scale)
        noise = [next(draws) for _ in range(recipe.stages)]
        context = packing.read_context(each, timeline)
        result = section.denoise(
            TRANSFORMER, cfg, params, recipe, noise, how, context, texts[0],
            texts[1] if scale > 1 else None,
        )  # fmt: skip
        timeline.write(each.targets, result.latents)
        expected = last(recorded[f"{name}/decoded_latents{i}"])
        assert relative_error(result.latents * std + mean, expected) < 5e-4
    assert next(draws, None) is None
