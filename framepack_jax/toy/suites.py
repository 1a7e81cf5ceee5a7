"""The parts of an evaluation: whose videos each has, and the tables that come of their figures."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from framepack_jax import packing
from framepack_jax.evaluation.drift import drift, estimate, mean
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
# What a still picture lacks, beside the drift that it does not have either.
BESIDE_DRIFT = ("dynamics", "caption")
# The whole context, which is the row of the model itself, and what is kept from it.
BLANKS = (("k2",), ("k4",), ("k2", "k4"))
Videos = Sequence[np.ndarray] | np.ndarray
Make = Callable[[FramePack | None, Sequence[Case], Settings], Videos]
ByRow = Mapping[str, Mapping[str, Figures]]
"""Figures by row, then by name of the case."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of tables and how its videos are made; `model` is the number of the model whose
    weights it takes, None without. With `extendable` a longer video begins like a shorter one."""

    name: str
    model: int | None
    make: Make
    extendable: bool = True


@dataclasses.dataclass(frozen=True)
class Suite:
    """Cases of equal length, the rows of their videos, and what is measured of each. `shorter` are
    parts of the same cases at lesser lengths."""

    name: str
    cases: Sequence[Case]
    rows: Sequence[Row]
    measure: Callable[[Case, np.ndarray], Figures]
    shorter: Sequence["Suite"] = ()


def references() -> list[Row]:
    """The four rows that stand in every table; the first model lends its VAE, and repeats."""
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
        Row(
            REPEATED, 0,
            lambda pipe, asked, settings: baselines.repeated(
                _loaded(pipe), _asks(asked), _sections(_loaded(pipe), asked), settings
            ),
        ),
    ]  # fmt: skip


def _loaded(pipe: FramePack | None) -> FramePack:
    assert pipe is not None, "a row with a model gets a pipeline"
    return pipe


def model_row(name: str, number: int, blank: Collection[str] = (), shuffled: bool = False) -> Row:
    """The videos of a model; without the context under the kernels `blank`, or with the captions
    of other cases."""
    return Row(name, number, functools.partial(_sample, blank=tuple(blank), shuffled=shuffled))


def drift_rows(name: str, number: int, schedule: packing.Schedule) -> list[Row]:
    """A model as it is."""
    extendable = schedule.order == "forward"
    return [dataclasses.replace(model_row(name, number), extendable=extendable)]


def forgetting_rows(name: str, number: int, schedule: packing.Schedule) -> list[Row]:
    """A model with all of its context, and without parts that its schedule has."""
    kernels = {segment.kernel for segment in schedule.segments}
    made = [model_row(name, number)]
    for blank in BLANKS:
        if set(blank) <= kernels:
            made.append(model_row(f"{name}, without {' and '.join(blank)}", number, blank))
    return made


def prompt_rows(name: str, number: int, schedule: packing.Schedule) -> list[Row]:
    """A model with its captions, and with those of others as a control."""
    return [model_row(name, number), model_row(name + SHUFFLED, number, shuffled=True)]


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
    """Fewest sections that make so many frames."""
    window = pipe.schedule.window
    return max(1, math.ceil((frames - 1) / (window * pipe.geometry.time_compression)))


def quality(seconds: float, found: ByRow) -> Table:
    """Means over the whole of each video."""
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
    """Drift of every metric, and beside it what a picture that does not drift lacks."""
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
    """What is left of a sprite that was hidden."""
    return _means(
        f"Forgetting: a sprite hidden for {hidden:g} s",
        f"In the {scenes.AFTER:g} s after it should be out again; place where it is found.",
        FORGETTING_METRICS,
        found,
    )


def prompting(seconds: float, found: ByRow) -> Table:
    """Whether captions decide what happens."""
    with_ratio = {
        row: {
            case: f | {"ratio": _ratio(f["dynamics"], found[TRUTH][case]["dynamics"])}
            for case, f in by.items()
        }
        for row, by in found.items()
    }
    return _means(
        f"Counterfactual prompts, {seconds:.1f} s",
        "Two captions for each first frame that differ in the motion of one sprite: how often its"
        " motion is nearer to that of its own caption. By chance: 0.5.",
        PROMPT_METRICS,
        with_ratio,
    )


def _ratio(value: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.asarray(float(value) / float(truth) if truth > 0 else math.nan)


def _means(title: str, about: str, columns: Mapping[str, Metric], found: ByRow) -> Table:
    table = {
        row: {name: estimate(float(f[name]) for f in by.values()) for name in columns}
        for row, by in found.items()
    }
    return Table(title, about, columns, table)
