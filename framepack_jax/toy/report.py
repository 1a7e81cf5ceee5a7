"""Write the report of an evaluation: report.md, report.json, plots and contact sheets."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from framepack_jax import video
from framepack_jax.evaluation import plots, tables
from framepack_jax.evaluation.tables import Table
from framepack_jax.toy import results, suites
from framepack_jax.toy.suites import ByRow, Suite
from framepack_jax.toy.world import FPS
from framepack_jax.utils.files import atomic_write

SUMMARY = "plots/summary.png"
SHEETS = 3
"""Number of cases per suite with a contact sheet."""
ROW_CASES = 4
"""Number of cases in the contact sheet of a row."""
SHEET_COLUMNS, CELL = 8, 128


def write(
    folder: Path,
    made: Sequence[tuple[Suite, ByRow]],
    models: Sequence[str],
    about: Mapping[str, Any],
) -> list[Table]:
    """Write the report to `folder` and return its tables.

    The first table is a summary, whose rows link to a contact sheet of some of their videos. Other
    contact sheets show one case, with one strip of frames per row of the table.
    """
    if not made:
        return []
    text: list[str] = []
    hiding: dict[float, Table] = {}
    kinds: dict[str, Table] = {}
    written: list[Table] = []
    for suite, found in made:
        new = _tables(suite, found)
        written += new.values()
        kinds |= new
        if "forgetting" in new:
            hiding[float(suite.name.partition("_")[2].removesuffix("s"))] = new["forgetting"]
        text += [_noted(table, [m for m in models if m in found]) for table in new.values()]
        curves = _over_time(folder, suite.name, found) if "drift" in new else []
        text.append(_shown([*curves, *_sheets(folder, suite, list(found))]))
    if hiding:
        text.append("## Forgetting over the time hidden\n\n" + _shown(_over_hiding(folder, hiding)))
    complete = {row for _, found in made for row in found}
    rows = [row for row in (*suites.REFERENCES, *models) if row in complete]
    summary = suites.summary(kinds, rows)
    plots.of_table(folder / SUMMARY, summary)
    sheets = _row_sheets(folder, made, rows)
    plain: dict[str, Any] = {"about": about, "summary": tables.plain(summary), "sheets": sheets}
    plain["tables"] = [tables.plain(table) for table in written]
    with atomic_write(folder / "report.json") as partial:
        partial.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n")
    head = [_head(about), tables.markdown(summary, links=sheets), _shown([SUMMARY])]
    with atomic_write(folder / "report.md") as partial:
        partial.write_text("\n".join(head + text))
    return written


def _tables(suite: Suite, found: ByRow) -> dict[str, Table]:
    """Return the tables of a suite by kind, as `suites.summary` takes them."""
    kind, _, amount = suite.name.partition("_")
    seconds = max(case.frames for case in suite.cases) / FPS
    if kind == "drift":
        return {
            "quality": suites.quality(seconds, found),
            "drift": suites.drifting(seconds, found),
        }
    if kind == "forgetting":
        return {"forgetting": suites.forgetting(float(amount.removesuffix("s")), found)}
    return {"prompts": suites.prompting(seconds, found)}


def _noted(table: Table, models: Sequence[str]) -> str:
    return tables.markdown(table, tables.against(table, suites.TRUTH, suites.FROZEN, models))


def _row_sheets(
    folder: Path, made: Sequence[tuple[Suite, ByRow]], rows: Sequence[str]
) -> dict[str, str]:
    """Write a contact sheet for each row, with one strip for each of its first cases in the last
    drift suite, or else the first suite; return their names by row."""
    drifts = [part for part in made if part[0].name.startswith("drift")]
    suite, found = (drifts or list(made))[-1 if drifts else 0]
    names = {}
    for row in rows:
        if row not in found:
            continue
        cases = suite.cases[:ROW_CASES]
        strips = [_strip(results.video_file(folder, row, case)) for case in cases]
        captions = [case.scene.caption for case in cases]
        names[row] = f"sheets/rows/{results.file_name(row)}.png"
        (folder / names[row]).parent.mkdir(parents=True, exist_ok=True)
        video.save_png(folder / names[row], video.labelled_sheet(strips, captions, columns=1))
    return names


def _head(about: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in about.items() if not isinstance(value, dict)}
    plain["references by"] = about["references"]["bundle"]
    plain |= {f"schedule of {name}": row["schedule"] for name, row in about["rows"].items()}
    lines = [f"- {name}: {value}" for name, value in plain.items()]
    return "\n".join(["# Evaluation", "", *lines, ""])


def _shown(pictures: Sequence[str]) -> str:
    return "\n".join(f"![{Path(name).stem}]({name})\n" for name in pictures)


def _over_time(folder: Path, suite: str, found: ByRow) -> list[str]:
    names = []
    for name, metric in suites.DRIFT_METRICS.items():
        curves = {row: [figures[name] for figures in by.values()] for row, by in found.items()}
        names.append(f"plots/{suite}_{name}.png")
        plots.over_time(folder / names[-1], metric, curves, FPS)
    return names


def _over_hiding(folder: Path, tables: Mapping[float, Table]) -> list[str]:
    names = []
    rows = list(dict.fromkeys(row for table in tables.values() for row in table.rows))
    for name, metric in suites.FORGETTING_METRICS.items():
        points = {
            row: {hidden: table.rows[row][name] for hidden, table in tables.items()} for row in rows
        }
        names.append(f"plots/forgetting_{name}.png")
        plots.over_hiding(folder / names[-1], metric, points)
    return names


def _sheets(folder: Path, suite: Suite, rows: Sequence[str]) -> list[str]:
    names = []
    for case in suite.cases[:SHEETS]:
        names.append(f"sheets/{suite.name}_{case.name}.png")
        (folder / "sheets").mkdir(exist_ok=True)
        strips = [_strip(results.video_file(folder, row, case)) for row in rows]
        video.save_png(folder / names[-1], video.labelled_sheet(strips, rows, columns=1))
    return names


def _strip(file: Path) -> np.ndarray:
    """Return a strip of frames of a video at equal distances, from first to last."""
    picks = np.linspace(0, video.mp4_info(file).frames - 1, SHEET_COLUMNS).round().astype(int)
    frames = []
    for frame in video.read_frames_at(file, picks.tolist()):
        size = CELL, max(1, round(frame.shape[0] * CELL / frame.shape[1]))
        frames.append(np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)))
    return np.concatenate(frames, axis=1)
