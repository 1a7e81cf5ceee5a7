"""Table of ELO ratings, Markdown and JSON."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from framepack_jax.evaluation.elo import ratings
from framepack_jax.evaluation.elo.votes import Votes
from framepack_jax.utils.files import atomic_write_text


def results(votes: Votes, seed: int = 0) -> dict[str, Any]:
    """Rate the methods; return plain values for JSON, the best method first."""
    rating, error = ratings.rate(votes.pairs, votes.scores, len(votes.methods), seed)
    rank = ratings.ranks(rating)
    counts = _counts(votes)
    decided = votes.scores != 0.5
    return {
        "votes": len(votes.scores),
        "raters": votes.raters,
        "left_share": float(votes.scores[decided].mean()) if decided.any() else None,
        "orders": ratings.ORDERS,
        "samples": ratings.SAMPLES,
        "methods": [
            {
                "name": votes.methods[i],
                "rank": rank[i],
                "elo": float(rating[i]),
                "error": float(error[i]),
                **_outcomes(counts[i].sum(axis=0)),
            }
            for i in np.argsort(-rating, kind="stable").tolist()
        ],
        "pairs": [
            {
                "first": votes.methods[i], "second": votes.methods[j],
                **_outcomes(counts[i, j]),
                "tie_of_ratings": bool(abs(rating[i] - rating[j]) <= ratings.TIE),
            }
            for i, j in itertools.combinations(range(len(votes.methods)), 2)
            if counts[i, j].any()
        ],
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """Format the `results` as Markdown."""
    lines = [
        "# ELO ratings", "",
        "| rank | method | ELO | votes | better | tie | worse |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in found["methods"]:
        cells = [
            row["rank"], row["name"], f"{row['elo']:.0f} ± {row['error']:.0f}",
            row["better"] + row["tie"] + row["worse"], row["better"], row["tie"], row["worse"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "", "| pair | first better | tie | second better | ratings |", "|---|---:|---:|---:|---|"
    ]  # fmt: skip
    for row in found["pairs"]:
        verdict = "tie" if row["tie_of_ratings"] else "differ"
        cells = [
            f"{row['first']} / {row['second']}", row["better"], row["tie"], row["worse"], verdict
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", *_notes(found), ""])


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write ratings.md and ratings.json to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "ratings.json", json.dumps(found, indent=2) + "\n")
    atomic_write_text(folder / "ratings.md", markdown(found))


def _counts(votes: Votes) -> np.ndarray:
    """Count how often a method is better than another, equal, worse: (M, M, 3)."""
    counts = np.zeros((len(votes.methods), len(votes.methods), 3), int)
    outcome = (2 * (1 - votes.scores)).astype(int)
    first, second = votes.pairs.T
    np.add.at(counts, (first, second, outcome), 1)
    np.add.at(counts, (second, first, 2 - outcome), 1)
    return counts


def _outcomes(counts: np.ndarray) -> dict[str, int]:
    return dict(zip(("better", "tie", "worse"), counts.tolist(), strict=True))


def _notes(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{found['votes']} votes of {found['raters']} raters. Updates of 32 points from"
        f" {ratings.START:.0f}; mean over {found['orders']} random orders of the votes; error:"
        f" standard deviation over {found['samples']} bootstrap samples of the votes. Ratings"
        f" within {ratings.TIE:.0f} are a tie; a rank is 1 + the number of methods that are better"
        " by more."
    )
    if found["left_share"] is not None:
        yield f"The left video won {found['left_share']:.0%} of the votes that were no tie."
