"""The page holds the pairs blind, with balanced sides, in one folder."""

import html.parser
import json
import os
from pathlib import Path

import pytest

from framepack_jax.evaluation.elo import page, runs
from framepack_jax.evaluation.elo.runs import Pair, Run
from tests.fixtures.elo_runs import make_run

NAMES = ["inverted", "history_guidance"]


class Scripts(html.parser.HTMLParser):
    """The texts of the scripts of a page, and the addresses of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        self.inside = tag == "script"
        self.addresses += [v for name, v in attributes if name in ("src", "href")]
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag) -> None:
        self.inside = False

    def handle_data(self, data) -> None:
        if self.inside:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    folders = [root / name for name in NAMES]
    for number, folder in enumerate(folders):
        for seed in range(3):
            prompt = f'</script><b>prompt {seed}</b> & "more"'
            make_run(folder / str(seed), seed=seed, prompt=prompt, steps=1 + number)
    methods = runs.read_methods(folders)
    page.write(root / "page", NAMES, runs.match(folders, methods), seed=3)
    return root


def data_of(root: Path) -> dict:
    return json.loads(Scripts((root / "page" / "index.html").read_text()).scripts[0])


def test_page_shows_the_videos_of_each_pair(written: Path) -> None:
    data = data_of(written)
    key = page.decode_key(data["key"])
    assert key["methods"] == NAMES and len(data["pairs"]) == 3
    for shown, methods in zip(data["pairs"], key["pairs"], strict=True):
        seed = shown["prompt"][len("</script><b>prompt ")]
        assert shown["prompt"] == f'</script><b>prompt {seed}</b> & "more"'
        for side, method in zip(("left", "right"), methods, strict=True):
            source = written / NAMES[method] / seed / "video.mp4"
            assert (written / "page" / shown[side]).read_bytes() == source.read_bytes()


def test_nothing_on_the_page_names_a_run(written: Path) -> None:
    text = (written / "page" / "index.html").read_text()
    files = [str(file.relative_to(written / "page")) for file in (written / "page").rglob("*")]
    for word in [*NAMES, str(written), "run.json", "seed_"]:
        assert word not in text and not any(word in file for file in files)
    scripts = Scripts(text)
    # No server and no network: nothing is loaded but the videos beside the page.
    assert not scripts.addresses and "http" not in text and len(scripts.scripts) == 2
    assert all(len(Path(file).stem) == 16 for file in files if file.endswith(".mp4"))


def test_videos_are_links_where_the_disk_has_them(written: Path, tmp_path, monkeypatch) -> None:
    data = data_of(written)
    assert (written / "page" / data["pairs"][0]["left"]).stat().st_nlink == 2

    def refuse(*_) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    folders = [written / name for name in NAMES]
    pairs = runs.match(folders, runs.read_methods(folders))
    page.write(tmp_path / "copied", NAMES, pairs, seed=3)
    assert data_of(written) == json.loads(
        Scripts((tmp_path / "copied" / "index.html").read_text()).scripts[0]
    )
    copied = tmp_path / "copied" / data["pairs"][0]["left"]
    assert copied.stat().st_nlink == 1 and copied.stat().st_size > 0


def test_sides_are_balanced_and_order_is_random() -> None:
    other = {}, {}, {}, 1, 1.0
    each = [
        Pair((a, b), (Run(Path(f"{a}/{i}"), *other), Run(Path(f"{b}/{i}"), *other)))
        for a, b in ((0, 1), (0, 2))
        for i in range(20)
    ]  # fmt: skip
    arranged = [page.arrange(each, seed) for seed in range(8)]
    for shown in arranged:
        assert {p.runs[0].folder for p in shown} | {p.runs[1].folder for p in shown} == {
            run.folder for pair in each for run in pair.runs
        }
        for pair in shown:
            assert tuple(str(run.folder)[0] for run in pair.runs) == tuple(map(str, pair.methods))
        for other in (1, 2):
            assert sum(pair.methods == (0, other) for pair in shown) == 10
    assert page.arrange(each, 0) == arranged[0] != arranged[1]
    # The first pair of methods and its sides depend on the seed.
    assert len({shown[0].methods for shown in arranged}) > 2


def test_a_folder_in_use_is_refused(written: Path) -> None:
    with pytest.raises(ValueError, match="page is not an empty folder; choose another one"):
        page.write(written / "page", NAMES, [], seed=0)
