"""From runs to ratings as a user goes: sample, write the page, vote in a browser, rate."""

import json
from pathlib import Path

import pytest

from framepack_jax.__main__ import main as framepack
from framepack_jax.evaluation.elo.page import decode_key
from tests.fixtures.browser import Browser, browser, needs_chromium, wait_for
from tests.fixtures.elo_runs import make_run
from tests.fixtures.small_run import command

LEFT, RIGHT, DOWN, BACK = "\ue012", "\ue014", "\ue015", "\ue003"
CASES = 3


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page of two methods with three cases each."""
    root = tmp_path_factory.mktemp("elo")
    for number, name in enumerate(("inverted", "anchor_frames")):
        for seed in range(CASES):
            make_run(root / name / str(seed), seed=seed, steps=9 + number, colour=60 + 90 * number)
    runs = [str(root / name) for name in ("inverted", "anchor_frames")]
    framepack(["elo", *runs, "--output", str(root / "page")])
    return root / "page"


def stored(window: Browser) -> list[str]:
    script = "return JSON.parse(localStorage.getItem(store)).votes.map((vote) => vote.choice)"
    return window.run(script)


def ready(window: Browser) -> None:
    window.wait('!document.getElementById("vote-tie").disabled')


@needs_chromium
def test_votes_are_given_undone_kept_and_saved(page: Path, tmp_path: Path, capsys) -> None:
    with browser(tmp_path) as window:
        window.open(page / "index.html")
        ready(window)
        assert window.run('return document.getElementById("count").textContent') == "Pair 1 of 3"
        assert not any(word in window.run("return document.body.innerText") for word in ("anchor",))
        window.wait("sides.every((video) => !video.paused || video.currentTime > 0)")
        first = window.run("return sides.map((video) => video.getAttribute('src'))")
        window.press(LEFT)
        ready(window)
        assert stored(window) == ["left"]
        window.click("vote-tie")
        ready(window)
        window.press(BACK)
        ready(window)
        assert stored(window) == ["left"]
        window.click("undo")
        ready(window)
        assert stored(window) == []
        assert window.run("return sides.map((video) => video.getAttribute('src'))") == first
        window.press(RIGHT)
        ready(window)
        # Votes outlive the page.
        window.open(page / "index.html")
        ready(window)
        assert stored(window) == ["right"]
        assert window.run('return document.getElementById("count").textContent') == "Pair 2 of 3"
        window.press(DOWN)
        ready(window)
        window.click("vote-left")
        window.wait('!document.getElementById("done").hidden')
        assert window.run('return document.getElementById("progress").value') == CASES
        window.press(LEFT)
        assert stored(window) == ["right", "tie", "left"]
        window.click("save")
        wait_for(lambda: bool(list(tmp_path.glob("votes-*.json"))), "the file of votes")
    (file,) = tmp_path.glob("votes-*.json")
    saved = json.loads(file.read_text())
    assert [vote["choice"] for vote in saved["votes"]] == ["right", "tie", "left"]
    framepack(["elo-ratings", str(file), "--output", str(tmp_path / "ratings")])
    assert "3 votes of 1 raters" in capsys.readouterr().out
    found = json.loads((tmp_path / "ratings" / "ratings.json").read_text())
    # The winners follow from the key: the right side of the first pair, the left of the third.
    key = decode_key(saved["key"])
    wins = [key["methods"][key["pairs"][0][1]], key["methods"][key["pairs"][2][0]]]
    better = {row["name"]: row["better"] for row in found["methods"]}
    assert better == {name: wins.count(name) for name in key["methods"]}


@needs_chromium
def test_a_phone_shows_both_videos_and_buttons(page: Path, tmp_path: Path) -> None:
    with browser(tmp_path) as window:
        window.resize(500, 800)
        window.open(page / "index.html")
        ready(window)
        assert window.run("return document.documentElement.scrollWidth <= innerWidth")
        for name in ("left", "right", "vote-left", "vote-tie", "vote-right"):
            shape = window.run(f'return document.getElementById("{name}").getBoundingClientRect()')
            assert shape["width"] > 80 and shape["height"] > 40
            assert shape["bottom"] <= window.run("return innerHeight")


@needs_chromium
def test_a_video_that_cannot_be_played_is_named_and_skipped(page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "page"
    (broken / "videos").mkdir(parents=True)
    (broken / "index.html").write_bytes((page / "index.html").read_bytes())
    for file in (page / "videos").iterdir():
        (broken / "videos" / file.name).write_bytes(b"no video")
    with browser(tmp_path) as window:
        window.open(broken / "index.html")
        window.wait('document.getElementById("note").textContent.includes("cannot play videos/")')
        window.press(LEFT)
        assert stored(window) == []
        window.wait('!document.getElementById("skip").hidden')
        window.click("skip")
        window.wait('document.getElementById("count").textContent === "Pair 2 of 3"')
        assert window.run('return document.getElementById("save").disabled')


def test_sampled_runs_become_a_page(tmp_path: Path, capsys) -> None:
    """The records are those of `framepack sample`; runs without a counterpart are listed."""
    for name, steps, seeds in (("one_step", 1, (0, 1)), ("two_steps", 2, (0,))):
        for seed in seeds:
            command(tmp_path / name / str(seed), steps=steps, seed=seed, sections=1)
    runs = [str(tmp_path / name) for name in ("one_step", "two_steps")]
    framepack(["elo", *runs, "--output", str(tmp_path / "page")])
    shown = capsys.readouterr().out
    assert "index.html: 1 pairs of 2 methods" in shown
    assert f"1 runs have no counterpart and are left out:\n  {tmp_path}/one_step/1" in shown
    assert len(list((tmp_path / "page" / "videos").glob("*.mp4"))) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["a", "b"], "--output is missing"),
        (["a", "--output", "p"], "only a is given: expected the runs of two or more methods"),
        (["a", "b", "--output", "p", "--seed", "-1"], "--seed -1: expected 0 to 4294967295"),
    ],
)
def test_bad_flags_are_refused(flags, words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    with pytest.raises(SystemExit, match=words):
        framepack(["elo", *flags])
    assert not (tmp_path / "p").exists()
