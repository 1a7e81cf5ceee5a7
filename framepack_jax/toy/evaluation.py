"""Evaluate bundles on the toy world: sample, measure, report.

Every video is saved with its metrics as soon as it is sampled, so an interrupted evaluation resumes
without sampling it again.
"""

import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.jobs.provenance import weights
from framepack_jax.toy import baselines, report, results, scenes, suites
from framepack_jax.toy.rows import RowSpec, open_models
from framepack_jax.toy.suites import Model, Row, Suite
from framepack_jax.utils.progress import Bar

FPS = scenes.FPS


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation: rows, suites and sampling.

    Args:
        rows: models under test; the references use the bundle and settings of the first one.
        videos: number of scenes of each drift suite.
        seconds: durations of the drift suites.
        occlusion_videos: number of scenes of each forgetting suite.
        occlusion_seconds: durations for which a sprite is hidden, one forgetting suite each.
        prompt_pairs: number of first frames of the prompt suite, each with two captions.
        pair_seconds: duration of the videos of the prompt suite.
        size: (height, width) in pixels.
        batch: number of videos sampled together.
    """

    output: Path
    rows: tuple[RowSpec, ...]
    videos: int
    seconds: tuple[float, ...]
    occlusion_videos: int
    occlusion_seconds: tuple[float, ...]
    prompt_pairs: int
    pair_seconds: float
    size: tuple[int, int]
    settings: Settings
    """Settings of rows that have no others."""
    seed: int
    batch: int
    dtype: str | None


def evaluate(cfg: EvaluationConfig) -> Path:
    """Sample, measure and report. Return the path of the report. Raises ValueError, OSError.

    The report is written after each model, with the rows that are complete.
    """
    models = open_models(cfg.rows, cfg.dtype)
    _check_size(cfg.size, models)
    results.begin(cfg.output, record(cfg, models))
    todo = list(parts(cfg, models))
    write = functools.partial(_report, cfg.output, todo, models)
    make_all(cfg.output, todo, models, cfg.settings, cfg.batch, write)
    return write()


def _report(folder: Path, todo: Sequence[Suite], models: Sequence[Model]) -> Path:
    """Write the report of the rows that are complete; return its path."""
    made = []
    for suite in todo:
        found = {row.name: figures(folder, row, suite) for row in suite.rows}
        made.append((suite, {n: f for n, f in found.items() if len(f) == len(suite.cases)}))
    about = json.loads((folder / results.SETTINGS).read_text())
    tables = report.write(folder, made, [model.name for model in models], about)
    return folder / "report.md" if tables else folder


def figures(folder: Path, row: Row, suite: Suite) -> dict[str, scenes.Figures]:
    found = {case.name: results.load(folder, row.name, case) for case in suite.cases}
    return {name: each for name, each in found.items() if each is not None}


def _check_size(size: tuple[int, int], models: Sequence[Model]) -> None:
    for model in models:
        if any(side % model.pipe.geometry.unit for side in size):
            raise ValueError(
                f"--size {size[0]}x{size[1]}: expected multiples of {model.pipe.geometry.unit}, the"
                f" patch size of {model.name} in pixels"
            )


def record(cfg: EvaluationConfig, models: Sequence[Model]) -> dict[str, Any]:
    """Return every setting that affects the videos. They must be equal to resume an evaluation."""
    first = models[0]
    return {
        "size": f"{cfg.size[0]}x{cfg.size[1]}",
        "steps": cfg.settings.steps,
        "sampler": cfg.settings.sampler,
        "guidance": cfg.settings.distilled_guidance,
        "cfg": cfg.settings.cfg_scale,
        "seed": cfg.seed,
        "dtype": first.pipe.dtype,
        "world": scenes.fingerprint(cfg.seed, cfg.size),
        "references": {"bundle": first.name, "weights": _hashes(first)},
        "rows": {model.name: _row_record(model, cfg.settings) for model in models},
    }


def _row_record(model: Model, default: Settings) -> dict[str, Any]:
    """Return what makes the videos of a row."""
    schedule = model.pipe.schedule
    record = {"schedule": str(schedule), "order": schedule.order, "weights": _hashes(model)}
    given, usual = dataclasses.asdict(model.settings), dataclasses.asdict(default)
    if changed := {name: value for name, value in given.items() if value != usual[name]}:
        record["settings"] = changed
    return record | ({"repeated": True} if model.repeated else {})


def _hashes(model: Model) -> dict[str, Any]:
    return {role: source.get("sha256") for role, source in weights(model.path).items()}


def parts(cfg: EvaluationConfig, models: Sequence[Model]) -> Iterator[Suite]:
    """Yield the requested suites with their cases and rows."""
    if cfg.videos:
        yield from _drift(cfg, models)
    if cfg.occlusion_videos:
        yield from _forgetting(cfg, models)
    if cfg.prompt_pairs:
        name, count = f"prompts_{cfg.pair_seconds:g}s", _frames(models[0].pipe, cfg.pair_seconds)
        made = scenes.counterfactual_cases(cfg.seed, cfg.prompt_pairs, count, cfg.size, name)
        yield Suite(name, made, _rows(models, suites.prompt_rows), scenes.prompt_figures)


def _drift(cfg: EvaluationConfig, models: Sequence[Model]) -> list[Suite]:
    found: list[Suite] = []
    for seconds in sorted(cfg.seconds):
        name, count = f"drift_{seconds:g}s", _frames(models[0].pipe, seconds)
        made = scenes.drift_cases(cfg.seed, cfg.videos, count, cfg.size, name)
        rows = _rows(models, suites.drift_rows)
        found.append(Suite(name, made, rows, scenes.drift_figures, tuple(found)))
    return found


def _forgetting(cfg: EvaluationConfig, models: Sequence[Model]) -> Iterator[Suite]:
    pipe = models[0].pipe
    for hidden in cfg.occlusion_seconds:
        name = f"forgetting_{hidden:g}s"
        made = scenes.hiding_cases(cfg.seed, cfg.occlusion_videos, hidden, cfg.size, name)
        whole = baselines.frames_for(pipe, suites.sections_of(pipe, made[0].frames))
        made = [dataclasses.replace(case, frames=whole) for case in made]
        yield Suite(name, made, _rows(models, suites.forgetting_rows), scenes.forgetting_figures)


def _frames(pipe: FramePack, seconds: float) -> int:
    return baselines.frames_for(pipe, baselines.sections_for(pipe, seconds, FPS))


def _rows(models: Sequence[Model], rows_of: Callable[[Model, int], list[Row]]) -> list[Row]:
    each = [rows_of(model, i) for i, model in enumerate(models)]
    return [*suites.references(), *itertools.chain(*each)]


def make_all(
    folder: Path, todo: Sequence[Suite], models: Sequence[Model], settings: Settings, batch: int,
    after_model: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Sample and measure every video missing in `folder`, in batches of `batch`. Calls
    `after_model` between models.

    `settings` are those of rows without a model. Only one model has its weights on the device at a
    time. The longest videos are sampled first, because the shorter ones are cut from them.
    """
    total = sum(len(suite.cases) * len(suite.rows) for suite in todo)
    with Bar(total=total, unit="video") as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for number in (None, *range(len(models))):
            pipe = None
            used = settings if number is None else models[number].settings
            order = sorted(todo, key=lambda suite: -len(suite.shorter))
            for suite, row in ((p, r) for p in order for r in p.rows if r.model == number):
                bar.set_description(f"{suite.name}, {row.name}")
                missing = [c for c in suite.cases if results.load(folder, row.name, c) is None]
                bar.update(len(suite.cases) - len(missing))
                if missing and number is not None and pipe is None:
                    pipe = models[number].pipe.with_weights(models[number].path)
                for first in range(0, len(missing), batch):
                    some = missing[first : first + batch]
                    began = time.monotonic()
                    made = row.make(pipe, some, used)
                    frames = sum(case.frames for case in some)
                    results.note_time(folder, row.name, frames, time.monotonic() - began)
                    numbers = [suite.cases.index(case) for case in some]
                    for each in (suite, *(suite.shorter if row.extendable else ())):
                        _keep(folder, row, each, [each.cases[i] for i in numbers], made, pool)
                    bar.update(len(some))
            if pipe is not None and number != len(models) - 1:
                after_model()


def _keep(
    folder: Path, row: Row, suite: Suite, asked: Sequence[scenes.Case], made: suites.Videos,
    pool: ThreadPoolExecutor,
) -> None:  # fmt: skip
    """Cut videos to the lengths of their cases, measure and save them. Skip saved videos."""
    new = [
        (case, frames[: case.frames])
        for case, frames in zip(asked, made, strict=True)
        if results.load(folder, row.name, case) is None
    ]
    for (case, frames), found in zip(new, pool.map(lambda p: suite.measure(*p), new), strict=True):
        results.save(folder, row.name, case, frames, found, FPS)
