"""Read from a diffusers pipeline how videos are sampled: its index and its scheduler's config.

Source: `model_index.json` and `scheduler/scheduler_config.json` of diffusers' `HeliosPipeline`,
`HeliosPyramidPipeline`, `WanPipeline` and `HunyuanVideoPipeline`, and the defaults of their calls.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from framepack_jax.bundle import Sampling
from framepack_jax.conversion.weight_files import ConversionError, read_json
from framepack_jax.diffusion.recipe import Recipe
from framepack_jax.models.wan.config import WanConfig
from framepack_jax.packing import BUCKETS_480P, RELEASED_F1

MODEL_INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
PIPELINES = ("HeliosPipeline", "HeliosPyramidPipeline", "WanPipeline", "HunyuanVideoPipeline")
SOLVERS: dict[str, Literal["unipc-flow", "euler", "renoise"]] = {
    "unipc": "unipc-flow", "euler": "euler", "dmd": "renoise",
}  # fmt: skip
SHIFTS = ("exponential", "linear")
# Of a Helios scheduler that does not say how many.
STAGES = 3
# Of the examples of the releases.
NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings,"
    " images, static, overall gray, worst quality, low quality, JPEG compression residue, ugly,"
    " incomplete, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured,"
    " misshapen limbs, fused fingers, still picture, messy background, three legs, many people in"
    " the background, walking backwards"
)
# Settings of schedulers that are supported; without one, it has its only value.
SUPPORTED = {
    "prediction_type": "flow_prediction", "predict_x0": True, "thresholding": False,
    "disable_corrector": [], "solver_order": 2, "solver_type": "bh2", "lower_order_final": True,
    "use_flow_sigmas": True, "num_train_timesteps": 1000, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "final_sigmas_type": "zero",
    "shift_terminal": None, "solver_p": None,
}  # fmt: skip


class PipelineSettings(NamedTuple):
    """Settings of a pipeline beside its networks: packing schedule and sizes of its videos, and
    how they are sampled. `schedule` is None if the pipeline does not tell it."""

    schedule: str | None = None
    buckets: tuple[tuple[int, int], ...] = BUCKETS_480P
    sampling: Sampling = Sampling()


def settings_of(pipeline: Path | None, transformer: Any = None) -> PipelineSettings:
    """Return the settings of a diffusers pipeline folder. Without one they are those of the release
    by the transformer's config, if there is any.

    Raises ConversionError for pipelines and schedulers that are near to a supported one.
    """
    if pipeline is None or not (pipeline / MODEL_INDEX).exists():
        return _released(transformer)
    index = read_json(pipeline / MODEL_INDEX)
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        return _released(transformer)
    refuse_experts(pipeline, index)
    file = pipeline / SCHEDULER
    if not file.exists():
        raise ConversionError(
            f"{pipeline} has no {SCHEDULER}, which says how a {name} is sampled; copy it from the"
            " release"
        )
    scheduler = read_json(file)
    if name == "HunyuanVideoPipeline":
        return _hunyuan(file, scheduler)
    _check(file, scheduler)
    return _wan(file, scheduler) if name == "WanPipeline" else _helios(file, scheduler, index)


def _released(transformer: Any) -> PipelineSettings:
    """Return the settings of the released model that a transformer's config is of."""
    if not isinstance(transformer, WanConfig):
        return PipelineSettings()
    released = Path("the release")
    if not transformer.context_kernels:
        return _wan(released, {})
    return _helios(released, {"stages": 1, "use_dynamic_shifting": True}, {})


def refuse_experts(pipeline: Path, index: Mapping[str, Any]) -> None:
    """Raise ConversionError for the index of a Wan 2.2 pipeline."""
    for field in ("boundary_ratio", "expand_timesteps"):
        if index.get(field):
            raise ConversionError(
                f"{pipeline} is a Wan 2.2 pipeline ({MODEL_INDEX} has {field} ="
                f" {index[field]}), whose two experts or other VAE are not supported; take Wan 2.1"
                " or Helios"
            )


def _check(file: Path, scheduler: Mapping[str, Any]) -> None:
    """Raise ConversionError for a scheduler with settings that are not supported."""
    for name, value in SUPPORTED.items():
        if name in scheduler and scheduler[name] != value:
            raise ConversionError(
                f"{file} has {name} = {scheduler[name]!r}; only {value!r} is supported"
            )
    for name, known in (("scheduler_type", SOLVERS), ("time_shift_type", SHIFTS)):
        if name in scheduler and scheduler[name] not in known:
            raise ConversionError(
                f"{file} has {name} = {scheduler[name]!r}; only {', '.join(known)} are supported"
            )
    if (found := scheduler.get("stage_range")) is not None:
        equal = np.linspace(0, 1, int(scheduler.get("stages", STAGES)) + 1).tolist()
        if len(found) != len(equal) or not np.allclose(found, equal):
            raise ConversionError(
                f"{file} has stage_range = {found}; only equal stages are supported: {equal}"
            )


def _wan(file: Path, scheduler: Mapping[str, Any]) -> PipelineSettings:
    if scheduler.get("use_dynamic_shifting"):
        raise ConversionError(f"{file} has use_dynamic_shifting; only False is supported for Wan")
    recipe = Recipe(
        solver="unipc-flow", lowest=0.001, shift="fixed",
        shift_factor=float(scheduler.get("flow_shift", 3.0)), whole_times=True,
    )  # fmt: skip
    sampling = Sampling(
        recipe, steps=50, cfg_scale=5.0, negative_prompt=NEGATIVE_PROMPT, fps=16.0, empty_start=True
    )
    return PipelineSettings("g21", ((480, 832), (832, 480)), sampling)


def _hunyuan(file: Path, scheduler: Mapping[str, Any]) -> PipelineSettings:
    if scheduler.get("use_dynamic_shifting"):
        raise ConversionError(
            f"{file} has use_dynamic_shifting; only False is supported for HunyuanVideo"
        )
    recipe = Recipe(solver="euler", shift="fixed", shift_factor=float(scheduler.get("shift", 7.0)))
    sampling = Sampling(recipe, steps=50, distilled_guidance=6.0, fps=24.0, empty_start=True)
    return PipelineSettings("g33", sampling=sampling)


def _helios(file: Path, scheduler: Mapping[str, Any], index: Mapping[str, Any]) -> PipelineSettings:
    stages, distilled = int(scheduler.get("stages", STAGES)), bool(index.get("is_distilled"))
    if scheduler.get("shift", 1.0) != 1.0:
        raise ConversionError(f"{file} has shift = {scheduler['shift']}; only 1.0 is supported")
    solver = SOLVERS["dmd" if distilled else scheduler.get("scheduler_type", "unipc")]
    dynamic = bool(scheduler.get("use_dynamic_shifting"))
    zero_star = bool(index.get("is_cfg_zero_star"))
    form = scheduler.get("time_shift_type", "linear" if distilled else "exponential")
    recipe = Recipe(
        solver=solver,
        highest=0.999,
        # A single stage takes the shift by tokens from the pipeline's call in any case.
        shift="tokens" if dynamic else "none",
        max_shift=None,
        exponential=form == "exponential",
        stages=stages,
        gamma=float(scheduler.get("gamma", 1 / 3)),
        whole_times=stages > 1,
        zero_star=zero_star,
        zero_steps=2 if zero_star else 0,
        double_first=distilled,
    )
    sampling = Sampling(
        recipe,
        steps=2 if distilled else 20 if stages > 1 else 50,
        cfg_scale=1.0 if distilled else 5.0,
        negative_prompt=NEGATIVE_PROMPT,
        fps=24.0,
        empty_start=True,
        anchor_apart=True,
        decode_alone=True,
        given_noise=(0.111, 0.135),
    )
    return PipelineSettings(RELEASED_F1, ((384, 640), (640, 384)), sampling)
