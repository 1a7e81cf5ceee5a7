"""Files of votes: several raters, and damaged files by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from framepack_jax.evaluation.elo import report
from framepack_jax.evaluation.elo.page import encode_key
from framepack_jax.evaluation.elo.votes import read

KEY = {"methods": ["inverted", "f1"], "pairs": [[0, 1], [1, 0], [1, 0]]}


def write(file: Path, choices: str, rater: str = "r1", key: dict = KEY, **changes) -> Path:
    votes = [
        {"pair": number, "choice": {"l": "left", "r": "right", "t": "tie"}.get(c, c), "seconds": 1}
        for number, c in enumerate(choices)
    ]
    saved = {"format": 1, "page": "p", "key": encode_key(key), "rater": rater, "votes": votes}
    file.write_text(json.dumps(saved | changes))
    return file


def test_votes_are_of_methods_not_of_sides(tmp_path: Path) -> None:
    """inverted wins on either side, then a tie."""
    votes = read([write(tmp_path / "v.json", "lrt")])
    assert votes.methods == ("inverted", "f1") and votes.raters == 1
    found = report.results(votes)
    assert [row["name"] for row in found["methods"]] == ["inverted", "f1"]
    assert found["pairs"] == [
        {"first": "inverted", "second": "f1", "better": 2, "tie": 1, "worse": 0,
         "tie_of_ratings": False}
    ]  # fmt: skip
    assert found["methods"][0]["elo"] + found["methods"][1]["elo"] == pytest.approx(2000)
    assert found["left_share"] == 0.5


def test_raters_and_pages_are_added_up(tmp_path: Path) -> None:
    """Another page may list the methods in another order, and one more."""
    key = {"methods": ["anchor", "f1", "inverted"], "pairs": [[2, 0], [1, 2]]}
    files = [
        write(tmp_path / "a.json", "lr"),
        write(tmp_path / "b.json", "l", rater="r2"),
        write(tmp_path / "c.json", "lr", rater="r2", key=key, page="q"),
    ]
    votes = read(files)
    assert votes.methods == ("inverted", "f1", "anchor") and votes.raters == 2
    np.testing.assert_array_equal(votes.pairs, [[0, 1], [1, 0], [0, 1], [0, 2], [1, 0]])
    np.testing.assert_array_equal(votes.scores, [1, 0, 1, 1, 0])
    found = report.results(votes)
    assert [row["votes" if "votes" in row else "better"] for row in found["methods"]] == [5, 0, 0]


def test_report_states_ties_and_how_it_was_made(tmp_path: Path) -> None:
    found = report.results(read([write(tmp_path / "v.json", "ltt")]))
    report.write(tmp_path / "out", found)
    text = (tmp_path / "out" / "ratings.md").read_text()
    assert "| inverted / f1 | 1 | 2 | 0 | differ |" in text
    assert "mean over 1000 random orders" in text and "200 bootstrap samples" in text
    assert json.loads((tmp_path / "out" / "ratings.json").read_text()) == found
    even = report.markdown(report.results(read([write(tmp_path / "t.json", "t")])))
    assert "| 1 | inverted | 1000 ± 0 | 1 | 0 | 1 | 0 |" in even and "| tie |" in even


@pytest.mark.parametrize(
    ("choices", "changes", "words"),
    [
        ("", {}, r"v\.json: no votes"),
        ("lx", {}, r"v\.json is no file of votes .*choice 'x': expected left, tie or right"),
        ("lllll", {}, r"pair 3: expected 0 to 2"),
        ("l", {"format": 9}, "its format is 9, expected 1"),
        ("l", {"page": 3}, "page and rater"),
        ("l", {"key": {"methods": ["a"], "pairs": [[0, 1]]}}, "it does not list"),
        ("l", {"votes": [{"pair": 0, "choice": "tie"}] * 2}, "a pair has two votes"),
        ("l", {"rater": None}, "page and rater"),
    ],
)
def test_damaged_votes_are_refused(tmp_path: Path, choices, changes, words) -> None:
    with pytest.raises(ValueError, match=words):
        read([write(tmp_path / "v.json", choices, **changes)])


def test_other_files_are_refused(tmp_path: Path) -> None:
    for text in ("[]", "no json", '{"votes": []}'):
        (tmp_path / "v.json").write_text(text)
        with pytest.raises(ValueError, match=r"v\.json is no file of votes"):
            read([tmp_path / "v.json"])
    with pytest.raises(ValueError, match=r"missing\.json does not exist"):
        read([tmp_path / "missing.json"])
    first = write(tmp_path / "v.json", "l")
    with pytest.raises(ValueError, match=r"v\.json and .*v2\.json are of the same rater"):
        read([first, write(tmp_path / "v2.json", "lr")])
    with pytest.raises(ValueError, match="no file of votes is given"):
        read([])
