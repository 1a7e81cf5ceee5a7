"""Plots of metrics over the time of a video, and over the time that a sprite was hidden."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from framepack_jax.evaluation.drift import SHARE, Estimate
from framepack_jax.evaluation.metrics import Metric
from framepack_jax.evaluation.tables import Table
from framepack_jax.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = 7.5, 4.0
PANEL = 1.9
"""Width of a panel of a table."""
POINTS = 150
"""Maximum number of points of a curve over time; frames are averaged."""


def over_time(
    path: Path, metric: Metric, rows: Mapping[str, Sequence[np.ndarray]], fps: float
) -> None:
    """Write a PNG of a metric over time: the mean over the videos of each row, with a band of its
    standard error. The parts that drift compares are shaded."""
    figure, axes = _axes(metric, "seconds")
    last = 0.0
    for name, videos in rows.items():
        times, mean, error = curve(videos, fps)
        if not len(times):
            continue
        last = max(last, times[-1])
        (line,) = axes.plot(times, mean, label=name, linewidth=1.2)
        axes.fill_between(times, mean - error, mean + error, color=line.get_color(), alpha=0.2)
    for part in ((0, SHARE * last), ((1 - SHARE) * last, last)):
        axes.axvspan(*part, color="grey", alpha=0.12, linewidth=0)
    _save(figure, axes, path)


def curve(videos: Sequence[np.ndarray], fps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return times, means over videos and their standard errors (0 for one video)."""
    count = min(map(len, videos))
    width = max(1, -(-count // POINTS))
    times, means, errors = [], [], []
    for first in range(0, count, width):
        parts = [video[first : first + width] for video in videos]
        each = [float(p[~np.isnan(p)].mean()) for p in parts if not np.isnan(p).all()]
        if each:
            times.append((first + min(width, count - first) / 2) / fps)
            means.append(np.mean(each))
            spread = np.std(each, ddof=1) / math.sqrt(len(each)) if len(each) > 1 else 0.0
            errors.append(spread)
    return np.asarray(times), np.asarray(means), np.asarray(errors)


def over_hiding(
    path: Path, metric: Metric, rows: Mapping[str, Mapping[float, Estimate | None]]
) -> None:
    """Write a PNG of a metric over the seconds for which a sprite was hidden, with error bars."""
    figure, axes = _axes(metric, "seconds hidden")
    seconds = sorted({time for points in rows.values() for time in points})
    for number, (name, points) in enumerate(rows.items()):
        # Points are offset sideways, so that equal values do not hide one another.
        aside = 0.05 * (number - (len(rows) - 1) / 2)
        there = {seconds.index(t) + aside: e for t, e in points.items() if e is not None}
        axes.errorbar(
            list(there), [e.mean for e in there.values()],
            yerr=[e.error or 0.0 for e in there.values()], label=name, capsize=3,
            # Colours repeat after ten rows.
            marker="os"[number // 10 % 2], linestyle=("-", "--")[number // 10 % 2],
        )  # fmt: skip
    axes.set_xticks(range(len(seconds)), [f"{time:g}" for time in seconds])
    _save(figure, axes, path)


def of_table(path: Path, table: Table) -> None:
    """Write a PNG with a panel for each column of a table: its estimates with error bars."""
    from matplotlib.figure import Figure

    columns, rows = list(table.columns.items()), list(table.rows)
    size = 1.5 + PANEL * len(columns), 1.2 + 0.25 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    for number, (name, metric) in enumerate(columns):
        axes = figure.add_subplot(1, len(columns), number + 1)
        for place, row in enumerate(rows):
            found = table.rows[row].get(name)
            if found is not None and math.isfinite(found.mean):
                axes.errorbar(found.mean, place, xerr=found.error or 0.0, fmt="ko", capsize=3)
        axes.set_title(f"{metric.title}\n({metric.unit})", fontsize="small")
        axes.set_yticks(range(len(rows)), rows if number == 0 else [""] * len(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _axes(metric: Metric, time: str) -> "tuple[Figure, Axes]":
    # Without pyplot, which needs a display backend and keeps global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(time)
    axes.set_ylabel(f"{metric.title} ({metric.unit})")
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: "Figure", axes: "Axes", path: Path) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
