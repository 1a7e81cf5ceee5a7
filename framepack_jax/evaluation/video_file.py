"""Measure one video file, without ground truth."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from framepack_jax import video
from framepack_jax.evaluation import clip_score, metrics, plots, tables, vbench_score
from framepack_jax.evaluation.drift import Estimate, drift, ends, mean
from framepack_jax.evaluation.metrics import METRICS
from framepack_jax.evaluation.tables import Table
from framepack_jax.utils.files import atomic_write

ROWS = {
    "first 15 %": lambda values: ends(values)[0],
    "last 15 %": lambda values: ends(values)[1],
    "drift": drift,
    "whole video": mean,
}
ALL_METRICS = METRICS | clip_score.METRICS | vbench_score.METRICS


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Networks of the user that score a video too.

    Args:
        clip: folder of a CLIP model.
        vbench: Python of an environment with VBench.
        dimensions: dimensions of VBench; default: all that it measures of any video.
        caption: caption to compare with.
    """

    clip: Path | None = None
    vbench: Path | None = None
    dimensions: tuple[str, ...] = ()
    caption: str = ""


NO_NETWORKS = Pretrained()


def evaluate(file: Path, output: Path | None = None, networks: Pretrained = NO_NETWORKS) -> str:
    """Measure a video file; return a table as Markdown.

    Args:
        output: folder for report.md, report.json, plots and a contact sheet.

    Raises ValueError if the file is no video, or if a network cannot score it, OSError.
    """
    if not file.exists():
        raise ValueError(f"--video {file} does not exist; expected a video file")
    info = video.mp4_info(file)
    figures = metrics.measure(video.read_frames(file), info.fps)
    if networks.clip is not None:
        figures |= clip_score.measure(networks.clip, video.read_frames(file), networks.caption)
    scores = {}
    if networks.vbench is not None:
        scores = vbench_score.measure(networks.vbench, file, networks.caption, networks.dimensions)
    table = table_of(f"{file.name}: {info.frames} frames, {info.fps:g} a second", figures, scores)
    text = tables.markdown(table)
    if output is not None:
        _write(output, file, table, figures, info.fps)
    return text


def table_of(
    title: str,
    figures: Mapping[str, np.ndarray],
    scores: Mapping[str, vbench_score.Scores] = MappingProxyType({}),
) -> Table:
    """Return a table with one column per metric and one number per cell, from values of every frame
    and from scores of every part."""
    found = {
        row: {name: _number(of(values)) for name, values in figures.items()}
        | {name: _number(parts[row]) for name, parts in scores.items()}
        for row, of in ROWS.items()
    }
    about = "Drift is |mean of the first 15 % of the frames - mean of the last 15 %|."
    columns = {name: ALL_METRICS[name] for name in (*figures, *scores)}
    return Table(title, about, columns, found)


def _number(value: float) -> Estimate | None:
    return None if np.isnan(value) else Estimate(value, None, 1)


def _write(
    output: Path, file: Path, table: Table, figures: Mapping[str, np.ndarray], fps: float
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    names = []
    for name, values in figures.items():
        names.append(f"plots/{name}.png")
        plots.over_time(output / names[-1], table.columns[name], {file.name: [values]}, fps)
    video.save_png(output / "sheet.png", video.contact_sheet_mp4(file))
    shown = [f"![{Path(name).stem}]({name})" for name in ("sheet.png", *names)]
    with atomic_write(output / "report.json") as partial:
        plain = tables.plain(table) | {
            "frames": {
                name: [None if np.isnan(v) else round(float(v), 6) for v in values]
                for name, values in figures.items()
            },
            "metrics": {name: dataclasses.asdict(metric) for name, metric in table.columns.items()},
        }
        partial.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n")
    with atomic_write(output / "report.md") as partial:
        partial.write_text(tables.markdown(table, shown))
