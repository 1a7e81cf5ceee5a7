"""Suites of an evaluation: the rows of their tables, and the tables of their metrics."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from framepack_jax.evaluation.drift import Estimate, drift, estimate, mean
from framepack_jax.evaluation.metrics import METRICS, Metric
from framepack_jax.evaluation.tables import Table
from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.toy import baselines, scenes
from framepack_jax.toy.scenes import Case, Figures

TRUTH, VAE, FROZEN, REPEATED = (
    "ground truth", "its VAE reconstruction", "frozen first frame", "repeated short image-to-video",
)  # fmt: skip
REFERENCES = (TRUTH, VAE, FROZEN, REPEATED)
SHUFFLED = ", prompts shuffled"
TRUTH_METRICS = {
    "identity": Metric("Identity", "share", 1),
    "caption": Metric("Caption agreement", "share", 1),
}
DRIFT_METRICS = METRICS | TRUTH_METRICS
FORGETTING_METRICS = {
    "hidden": Metric("Gone while hidden", "share", 1),
    "identity": Metric("Itself again", "share", 1),
    "place": Metric("Off its place", "heights", -1),
}
PROMPT_METRICS = {
    "match": Metric("Motion of its caption", "share", 1),
    "dynamics": METRICS["dynamics"],
    "ratio": Metric("Dynamic degree over truth's", "ratio", 0),
    "psnr": Metric("First frame", "dB", 1, 1),
}
# Columns of the summary: kind of table and metric.
SUMMARY = (
    ("quality", "sharpness"), ("drift", "sharpness"), ("quality", "smoothness"),
    ("quality", "dynamics"), ("quality", "identity"), ("drift", "identity"),
    ("quality", "caption"), ("forgetting", "identity"), ("prompts", "match"),
)  # fmt: skip
# Metrics that are low for a still picture, shown next to its zero drift.
BESIDE_DRIFT = ("dynamics", "caption")
# Context kernels hidden from the model, one row each.
BLANKS = (("k2",), ("k4",), ("k2", "k4"))
Videos = Sequence[np.ndarray] | np.ndarray
Make = Callable[[FramePack | None, Sequence[Case], Settings], Videos]
ByRow = Mapping[str, Mapping[str, Figures]]
"""Metrics by row, then by name of the case."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A bundle with a schedule and settings of the sampler, and its name in the tables.

    `repeated` chains single sections without history.
    """

    name: str
    path: str | Path
    pipe: FramePack
    settings: Settings
    repeated: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the tables, and the function that makes its videos.

    Args:
        model: index of the model whose weights `make` uses; None without weights.
        extendable: True if a longer video starts with the same frames as a shorter one.
    """

    name: str
    model: int | None
    make: Make
    extendable: bool = True


@dataclasses.dataclass(frozen=True)
class Suite:
    """Cases of equal length, the rows of their tables, and the metrics of each video.

    `shorter` holds suites with the same cases at shorter lengths.
    """

    name: str
    cases: Sequence[Case]
    rows: Sequence[Row]
    measure: Callable[[Case, np.ndarray], Figures]
    shorter: Sequence["Suite"] = ()


def references() -> list[Row]:
    """Return the four reference rows of every table.

    The first model gives the VAE reconstruction and the repeated image-to-video.
    """
    return [
        Row(TRUTH, None, lambda pipe, asked, settings: [case.truth() for case in asked]),
        Row(
            VAE, 0,
            lambda pipe, asked, settings: [
                baselines.reconstructed(_loaded(pipe), case.truth()) for case in asked
            ],
        ),
        Row(
            FROZEN, None,
            lambda pipe, asked, settings: [
                np.broadcast_to(c.image[None], (c.frames, *c.image.shape)) for c in asked
            ],
        ),
        Row(REPEATED, 0, _repeat),
    ]  # fmt: skip


def _loaded(pipe: FramePack | None) -> FramePack:
    assert pipe is not None, "a row with a model gets a pipeline"
    return pipe


def model_row(
    model: Model, number: int, note: str = "", blank: Collection[str] = (), shuffled: bool = False
) -> Row:
    """Return the row of a model, optionally without the context under the kernels `blank`.

    With `shuffled`, the model gets the captions of other cases. `note` follows its name.
    """
    make = functools.partial(_sample, blank=tuple(blank), shuffled=shuffled)
    if model.repeated:
        make = functools.partial(_repeat, shuffled=shuffled)
    return Row(model.name + note, number, make)


def drift_rows(model: Model, number: int) -> list[Row]:
    """Return the one row of a model in the drift suites."""
    extendable = model.repeated or model.pipe.schedule.order == "forward"
    return [dataclasses.replace(model_row(model, number), extendable=extendable)]


def forgetting_rows(model: Model, number: int) -> list[Row]:
    """Return rows of a model with its full context, and without some of its context kernels."""
    kernels = {segment.kernel for segment in model.pipe.schedule.segments}
    made = [model_row(model, number)]
    for blank in () if model.repeated else BLANKS:
        if set(blank) <= kernels:
            made.append(model_row(model, number, f", without {' and '.join(blank)}", blank))
    return made


def prompt_rows(model: Model, number: int) -> list[Row]:
    """Return rows of a model with its captions, and with shuffled captions as a control."""
    return [model_row(model, number), model_row(model, number, SHUFFLED, shuffled=True)]


def _repeat(
    pipe: FramePack | None, asked: Sequence[Case], settings: Settings, shuffled: bool = False
) -> np.ndarray:
    pipe, asks = _loaded(pipe), _asks(asked, shuffled)
    return baselines.repeated(pipe, asks, _sections(pipe, asked), settings)


def _sample(
    pipe: FramePack | None,
    asked: Sequence[Case],
    settings: Settings,
    blank: Collection[str] = (),
    shuffled: bool = False,
) -> np.ndarray:
    pipe, asks = _loaded(pipe), _asks(asked, shuffled)
    return baselines.sampled(pipe, asks, _sections(pipe, asked), settings, blank)


def _asks(asked: Sequence[Case], shuffled: bool = False) -> list[baselines.Prompt]:
    return [
        baselines.Prompt(case.image, case.shuffled if shuffled else case.scene.caption, case.seed)
        for case in asked
    ]


def _sections(pipe: FramePack, asked: Sequence[Case]) -> int:
    return sections_of(pipe, max(case.frames for case in asked))


def sections_of(pipe: FramePack, frames: int) -> int:
    """Return the smallest number of sections with at least `frames` frames."""
    window = pipe.schedule.window
    return max(1, math.ceil((frames - 1) / (window * pipe.geometry.time_compression)))


def quality(seconds: float, found: ByRow) -> Table:
    """Return the table of means over whole videos."""
    return Table(
        f"Over whole videos of {seconds:.1f} s",
        "Means over videos ± their standard errors.",
        DRIFT_METRICS,
        {
            row: {name: estimate(mean(f[name]) for f in by.values()) for name in DRIFT_METRICS}
            for row, by in found.items()
        },
    )


def drifting(seconds: float, found: ByRow) -> Table:
    """Return the table of the drift of every metric, with the means of `BESIDE_DRIFT`."""
    columns = {
        name: dataclasses.replace(metric, title=f"Drift of {metric.title.lower()}", better=-1)
        for name, metric in DRIFT_METRICS.items()
    }
    beside = {f"mean_{name}": DRIFT_METRICS[name] for name in BESIDE_DRIFT}
    table: dict[str, dict] = {}
    for row, by in found.items():
        table[row] = {name: estimate(drift(f[name]) for f in by.values()) for name in columns}
        for name in BESIDE_DRIFT:
            table[row][f"mean_{name}"] = estimate(mean(f[name]) for f in by.values())
    return Table(
        f"Drift over {seconds:.1f} s",
        "|mean of the first 15 % - mean of the last 15 %| of every video's frames; means over"
        " videos ± their standard errors. The last columns are means over whole videos.",
        columns | beside,
        table,
    )


def forgetting(hidden: float, found: ByRow) -> Table:
    """Return the table of metrics of hidden sprites."""
    return _means(
        f"Forgetting: a sprite hidden for {hidden:g} s",
        f"Measured in the {scenes.AFTER:g} s after the sprite should reappear."
        " Videos in which it is not found have no place.",
        FORGETTING_METRICS,
        found,
    )


def prompting(seconds: float, found: ByRow) -> Table:
    """Return the table of how well videos follow their captions."""
    with_ratio = {
        row: {
            case: f | {"ratio": _ratio(f["dynamics"], found[TRUTH][case]["dynamics"])}
            for case, f in by.items()
        }
        for row, by in found.items()
    }
    return _means(
        f"Counterfactual prompts, {seconds:.1f} s",
        "Two captions for each first frame differ in the motion of one sprite. The match is the"
        " share of videos whose motion is nearer to their own caption. Chance level: 0.5.",
        PROMPT_METRICS,
        with_ratio,
    )


def _ratio(value: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.asarray(float(value) / float(truth) if truth > 0 else math.nan)


def summary(tables: Mapping[str, Table], rows: Sequence[str]) -> Table:
    """Return one table of the main metrics, from the tables by kind: "quality", "drift",
    "forgetting" and "prompts"."""
    columns: dict[str, Metric] = {}
    found: dict[str, dict[str, Estimate | None]] = {row: {} for row in rows}
    for kind, name in SUMMARY:
        if kind in tables:
            columns[f"{kind}_{name}"] = tables[kind].columns[name]
            for row in rows:
                cells = tables[kind].rows.get(row, {})
                found[row][f"{kind}_{name}"] = cells.get(name)
    titles = " ".join(f"{table.title}." for table in tables.values())
    return Table("Summary", f"Columns of the tables below: {titles}", columns, found)


def _means(title: str, about: str, columns: Mapping[str, Metric], found: ByRow) -> Table:
    table = {
        row: {name: estimate(float(f[name]) for f in by.values()) for name in columns}
        for row, by in found.items()
    }
    return Table(title, about, columns, table)
