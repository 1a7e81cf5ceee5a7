"""Drift of a video, and means over videos with their standard errors.

Source: arXiv 2504.12626, section 4: drift is |M(first 15 %) - M(last 15 %)| of a metric M.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

SHARE = 0.15


class Estimate(NamedTuple):
    """A mean over so many `videos` and its standard error; None for a single video."""

    mean: float
    error: float | None
    videos: int


def drift(values: np.ndarray, share: float = SHARE) -> float:
    """Return |mean of the first share - mean of the last share| of the values (P,) of a video; nan
    if one of them has no value."""
    first, last = ends(values, share)
    return abs(first - last)


def ends(values: np.ndarray, share: float = SHARE) -> tuple[float, float]:
    """Return the means of the first and of the last share of values (P,)."""
    count = max(1, round(share * len(values)))
    return mean(values[:count]), mean(values[-count:])


def mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not nan; nan if there are none."""
    there = np.asarray(values, np.float64)
    there = there[~np.isnan(there)]
    return float(there.mean()) if there.size else math.nan


def estimate(values: Iterable[float]) -> Estimate | None:
    """Return mean and standard error over the videos that have a value; None if none has."""
    there = np.asarray([value for value in values if not math.isnan(value)], np.float64)
    if not there.size:
        return None
    error = float(there.std(ddof=1) / math.sqrt(there.size)) if there.size > 1 else None
    return Estimate(float(there.mean()), error, int(there.size))
