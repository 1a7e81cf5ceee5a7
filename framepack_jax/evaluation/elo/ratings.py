"""ELO ratings from votes, with their errors.

Source: arXiv 2504.12626 (table 2, "ELO-K32"): after each vote,
R_a += 32 (s - 1 / (1 + 10^((R_b - R_a) / 400))), and R_b -= the same. All ratings start at 1000.

The result depends on the order of the votes, which has no meaning here. Ratings are therefore means
over random orders. With few votes, ratings stay nearer to 1000 than the strengths that explain the
votes best; with many, the step of 32 widens a difference of 300 points by about 20.

Shapes: V votes, S sequences of votes, M methods.
"""

import numpy as np

START = 1000.0
STEP = 32.0
SCALE = 400.0
TIE = 16.0
"""Ratings that differ by at most this much are a tie (arXiv 2504.12626)."""
ORDERS = 1000
SAMPLES, SAMPLE_ORDERS = 200, 50
"""Bootstrap: samples of the votes, and random orders of each sample."""
MAX_CELLS = 2_000_000
"""Maximum number of votes in the sequences that are played together."""


def rate(
    pairs: np.ndarray, scores: np.ndarray, methods: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return ratings (M,) and their standard errors (M,).

    Ratings are means over `ORDERS` random orders of the votes. Errors are standard deviations over
    `SAMPLES` bootstrap samples of the votes, each rated by `SAMPLE_ORDERS` orders.

    Args:
        pairs: indices of the two methods of each vote, (V, 2).
        scores: 1 if the first method is better, 0.5 for a tie, 0 if the second is better, (V,).
    """
    rng = np.random.default_rng(seed)
    all_votes = np.arange(len(scores))
    drawn = rng.choice(all_votes, (SAMPLES, len(scores)))
    ratings = _over_orders(rng, all_votes[None], ORDERS, pairs, scores, methods)[0]
    samples = _over_orders(rng, drawn, SAMPLE_ORDERS, pairs, scores, methods)
    return ratings, samples.std(axis=0, ddof=1)


def play(pairs: np.ndarray, scores: np.ndarray, methods: int) -> np.ndarray:
    """Return the ratings (S, M) after sequences of votes: `pairs` (S, V, 2), `scores` (S, V)."""
    count = len(pairs)
    ratings = np.full(count * methods, START)
    # Indices of both methods of each vote in the flat array, one contiguous row for each vote.
    places = np.ascontiguousarray(pairs.transpose(2, 1, 0)) + methods * np.arange(count)
    for first, second, score in zip(*places, np.ascontiguousarray(scores.T), strict=True):
        change = STEP * (score - expected(ratings[first], ratings[second]))
        ratings[first] += change
        ratings[second] -= change
    return ratings.reshape(count, methods)


def expected(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the expected score of methods rated `first` against methods rated `second`."""
    return 1 / (1 + 10 ** ((second - first) / SCALE))


def ranks(ratings: np.ndarray) -> list[int]:
    """Return 1 + the number of methods that are better by more than `TIE`, for each method."""
    return [1 + int((ratings > rating + TIE).sum()) for rating in ratings]


def _over_orders(
    rng: np.random.Generator, votes: np.ndarray, orders: int, pairs: np.ndarray,
    scores: np.ndarray, methods: int,
) -> np.ndarray:  # fmt: skip
    """Return mean ratings (N, M) over random orders of N sets of votes, given by indices (N, V)."""
    total = np.zeros((len(votes), methods))
    sequences = np.repeat(np.arange(len(votes)), orders)
    size = max(1, MAX_CELLS // votes.shape[1])
    for first in range(0, len(sequences), size):
        some = sequences[first : first + size]
        order = rng.permuted(votes[some], axis=1)
        np.add.at(total, some, play(pairs[order], scores[order], methods))
    return total / orders
