"""ELO ratings against sums by hand, the fixed point of the update, and Bradley-Terry fits."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from framepack_jax.evaluation.elo import ratings


def win(first: float, second: float) -> float:
    return 1 / (1 + 10 ** ((second - first) / 400))


def simulated(
    strengths: np.ndarray, votes: int, seed: int, ties: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Votes of random pairs of methods with known strengths; a share of them are ties."""
    rng = np.random.default_rng(seed)
    every = np.array(list(itertools.permutations(range(len(strengths)), 2)))
    pairs = every[rng.integers(len(every), size=votes)]
    chance = win(*strengths[pairs].T)
    scores = (rng.random(votes) < chance).astype(float)
    return pairs, np.where(rng.random(votes) < ties, 0.5, scores)


def bradley_terry(pairs: np.ndarray, scores: np.ndarray, methods: int) -> np.ndarray:
    """Maximum likelihood strengths on the scale of ELO, with mean 1000; a tie is half a win."""

    def loss(free: np.ndarray) -> float:
        apart = (free[pairs[:, 0]] - free[pairs[:, 1]]) * np.log(10) / 400
        return float((np.logaddexp(0, apart) - scores * apart).mean() + 1e-12 * (free**2).sum())

    fit = minimize(loss, np.zeros(methods), method="BFGS", options={"gtol": 1e-9}).x
    return fit - fit.mean() + 1000


def play_one(votes: list[tuple[int, int, float]], methods: int) -> np.ndarray:
    pairs = np.array([[vote[:2] for vote in votes]])
    return ratings.play(pairs, np.array([[vote[2] for vote in votes]]), methods)[0]


def test_update_is_that_of_the_paper() -> None:
    # Equal ratings expect 0.5: half of 32 points change hands.
    np.testing.assert_allclose(play_one([(0, 1, 1.0)], 2), [1016, 984])
    np.testing.assert_allclose(play_one([(0, 1, 0.5)], 2), [1000, 1000])
    a, b, c = 1016.0, 984.0, 1000.0
    b, c = b + 32 * (0 - win(b, c)), c + 32 * (1 - win(c, b))
    a, c = a + 32 * (0.5 - win(a, c)), c + 32 * (0.5 - win(c, a))
    np.testing.assert_allclose(play_one([(0, 1, 1), (1, 2, 0), (0, 2, 0.5)], 3), [a, b, c])


def test_ratings_are_means_over_the_orders_of_the_votes() -> None:
    votes = [(0, 1, 1.0), (0, 1, 0.0), (1, 2, 1.0)]
    exact = np.mean([play_one(list(o), 3) for o in itertools.permutations(votes)], axis=0)
    pairs, scores = np.array([v[:2] for v in votes]), np.array([v[2] for v in votes])
    found, _ = ratings.rate(pairs, scores, 3)
    # Orders differ by less than 2 points here; 1000 of them are averaged.
    np.testing.assert_allclose(found, exact, atol=0.2)
    assert found.sum() == pytest.approx(3000)
    again, _ = ratings.rate(pairs, scores, 3)
    np.testing.assert_array_equal(found, again)


def test_expected_scores_equal_the_share_of_wins() -> None:
    """The fixed point of the update: after many votes, the expected score is the win share."""
    sequences, votes, share = 4000, 120, 0.7
    scores = (np.random.default_rng(0).random((sequences, votes)) < share).astype(float)
    found = ratings.play(np.tile([0, 1], (sequences, votes, 1)), scores, 2)
    # The standard error of this mean is 0.0013.
    assert ratings.expected(*found.T).mean() == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_many_votes_give_the_strengths_of_a_bradley_terry_fit(ties: float, monkeypatch) -> None:
    monkeypatch.setattr(ratings, "SAMPLES", 30)
    strengths = np.array([1150.0, 1080, 1000, 950, 820])
    pairs, scores = simulated(strengths, 1500, seed=1, ties=ties)
    found, error = ratings.rate(pairs, scores, 5)
    fitted = bradley_terry(pairs, scores, 5)
    # A tie is the resolution; the step of 32 widens large differences.
    np.testing.assert_allclose(found, fitted, atol=ratings.TIE)
    if not ties:
        assert (np.abs(found - strengths) < 4 * error).all()
    assert (np.argsort(found) == np.argsort(strengths)).all()


def test_errors_are_the_spread_over_repeated_experiments(monkeypatch) -> None:
    monkeypatch.setattr(ratings, "ORDERS", 100)
    monkeypatch.setattr(ratings, "SAMPLES", 40)
    monkeypatch.setattr(ratings, "SAMPLE_ORDERS", 20)
    strengths = np.array([1080.0, 1000, 920])
    each = [ratings.rate(*simulated(strengths, 90, seed), 3) for seed in range(40)]
    found, errors = (np.array(part) for part in zip(*each, strict=True))
    spread = found.std(axis=0, ddof=1)
    # The spread of 40 experiments is known to 11 %.
    np.testing.assert_allclose(errors.mean(axis=0), spread, rtol=0.3)
    few, many = (ratings.rate(*simulated(strengths, votes, 7), 3)[1].mean() for votes in (90, 1440))
    assert many < 0.6 * few


def test_ratings_within_16_share_a_rank() -> None:
    assert ratings.ranks(np.array([1220.0, 1224, 1174, 1170, 1190, 1015])) == [1, 1, 3, 4, 3, 6]
