"""Tables of means and standard errors: Markdown for people, JSON for programs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from framepack_jax.evaluation.drift import Estimate
from framepack_jax.evaluation.metrics import Metric


@dataclasses.dataclass(frozen=True)
class Table:
    """Estimates by row and column, with a title and a description. `columns` are metrics by name;
    `rows` are estimates by name of the row, then of the column."""

    title: str
    about: str
    columns: Mapping[str, Metric]
    rows: Mapping[str, Mapping[str, Estimate | None]]


def markdown(
    table: Table, notes: Sequence[str] = (), links: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Format heading, description, table and notes as Markdown; names of rows may have links."""
    titles = [f"{metric.title} ({metric.unit})" for metric in table.columns.values()]
    lines = [f"## {table.title}", "", table.about, ""]
    lines.append("| |" + "|".join(f" {title} " for title in titles) + "|")
    lines.append("|---|" + "---:|" * len(titles))
    for name, estimates in table.rows.items():
        cells = [text(estimates.get(c), metric.digits) for c, metric in table.columns.items()]
        shown = f"[{name}]({links[name]})" if name in links else name
        lines.append(f"| {shown} |" + "|".join(f" {cell} " for cell in cells) + "|")
    return "\n".join([*lines, *(part for note in notes for part in ("", note)), ""])


def text(estimate: Estimate | None, digits: int) -> str:
    """Format an estimate, "0.52 ± 0.03", without error if there is one video only."""
    if estimate is None:
        return "-"
    if estimate.error is None:
        return f"{estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f} ± {estimate.error:.{digits}f}"


def plain(table: Table) -> dict[str, Any]:
    """Convert a table to plain values for JSON."""
    return {
        "title": table.title,
        "about": table.about,
        "columns": {name: dataclasses.asdict(metric) for name, metric in table.columns.items()},
        "rows": {
            row: {name: None if e is None else _plain(e) for name, e in estimates.items()}
            for row, estimates in table.rows.items()
        },
    }


def parse(values: Mapping[str, Any]) -> Table:
    """Return the table that `plain` converted."""
    return Table(
        values["title"],
        values["about"],
        {name: Metric(**metric) for name, metric in values["columns"].items()},
        {
            row: {name: None if e is None else _parse(e) for name, e in estimates.items()}
            for row, estimates in values["rows"].items()
        },
    )


def _parse(values: Mapping[str, Any]) -> Estimate:
    mean = math.inf if values["mean"] is None else values["mean"]
    return Estimate(mean, values["error"], values["videos"])


def _plain(estimate: Estimate) -> dict[str, Any]:
    # JSON has no infinity.
    mean = estimate.mean if math.isfinite(estimate.mean) else None
    return {"mean": mean, "error": estimate.error, "videos": estimate.videos}


def against(table: Table, reference: str, frozen: str, models: Sequence[str]) -> list[str]:
    """Return one sentence per model: the metrics in which a still picture is better, and worse. For
    metrics with no better direction, nearer to the `reference` row is better."""
    notes = []
    for model in models:
        better: list[str] = []
        worse: list[str] = []
        for name, metric in table.columns.items():
            values = [table.rows.get(row, {}).get(name) for row in (frozen, model, reference)]
            means = [estimate.mean for estimate in values if estimate is not None]
            if len(means) < len(values):
                continue
            still, made, truth = means
            gain = metric.better * (made - still) or abs(still - truth) - abs(made - truth)
            if gain:
                (worse if gain > 0 else better).append(metric.title.lower())
        notes.append(
            f"Against {model}, the frozen first frame is better in {_listed(better)}; worse in"
            f" {_listed(worse)}."
        )
    return notes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "nothing"
