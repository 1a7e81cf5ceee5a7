"""Files of votes, as the page saves them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from framepack_jax.evaluation.elo.page import FORMAT, decode_key

SCORES = {"left": 1.0, "tie": 0.5, "right": 0.0}


@dataclasses.dataclass(frozen=True)
class Votes:
    """Votes of one or more raters.

    Args:
        methods: names of the methods.
        pairs: indices of the methods on the left and on the right, (V, 2).
        scores: 1 if the left one is better, 0.5 for a tie, 0 if the right one is better, (V,).
        raters: number of raters.
    """

    methods: tuple[str, ...]
    pairs: np.ndarray
    scores: np.ndarray
    raters: int


def read(files: Sequence[Path]) -> Votes:
    """Read files of votes, of one or several pages whose methods have the same names.

    Raises ValueError if a file is no file of votes, if two files are of the same rater and page, or
    if there is no vote.
    """
    if not files:
        raise ValueError("no file of votes is given; give the votes.json that the page saves")
    methods: list[str] = []
    pairs, scores = [], []
    raters: dict[tuple[str, str], Path] = {}
    for file in files:
        saved = _read(file)
        who = saved["page"], saved["rater"]
        if who in raters:
            raise ValueError(
                f"{raters[who]} and {file} are of the same rater and page; give the newer one only"
            )
        raters[who] = file
        key = saved["key"]
        numbers = []
        for name in key["methods"]:
            if name not in methods:
                methods.append(name)
            numbers.append(methods.index(name))
        for vote in saved["votes"]:
            pairs.append([numbers[side] for side in key["pairs"][vote["pair"]]])
            scores.append(SCORES[vote["choice"]])
    if not scores:
        raise ValueError(f"{', '.join(map(str, files))}: no votes; vote on the page, then save")
    return Votes(tuple(methods), np.array(pairs), np.array(scores), len({r for _, r in raters}))


def _read(file: Path) -> Mapping[str, Any]:
    """Read a file, with its key decoded. Raises ValueError."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is {saved['format']}, expected {FORMAT}")
        saved["key"] = decode_key(saved["key"])
        _check(saved)
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; expected a file that the page saves") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no file of votes ({error!r}); save it again") from error
    return saved


def _check(saved: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError if a vote or the key is damaged."""
    methods, pairs = saved["key"]["methods"], saved["key"]["pairs"]
    sides = [side for pair in pairs for side in pair]
    if len(sides) != 2 * len(pairs) or not all(0 <= side < len(methods) for side in sides):
        raise ValueError("its key names methods that it does not list")
    voted = [vote["pair"] for vote in saved["votes"]]
    if len(set(voted)) < len(voted):
        raise ValueError("a pair has two votes")
    for vote in saved["votes"]:
        if vote["choice"] not in SCORES:
            raise ValueError(f"choice {vote['choice']!r}: expected left, tie or right")
        if not 0 <= vote["pair"] < len(pairs):
            raise ValueError(f"pair {vote['pair']}: expected 0 to {len(pairs) - 1}")
    if not isinstance(saved["page"], str) or not isinstance(saved["rater"], str):
        raise TypeError("page and rater: expected texts")
