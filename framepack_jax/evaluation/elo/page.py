"""A static page that shows pairs of videos blind, side by side, and keeps votes.

index.html          the page; needs no server and no network
videos/HASH.mp4     hard links to the videos of the runs, or copies
"""

import base64
import hashlib
import importlib.resources
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from framepack_jax.evaluation.elo.runs import Pair, Run
from framepack_jax.utils.files import atomic_write_text

FORMAT = 1
PLACE = "/*PAGE*/"
"""Where the template takes the data of the page."""


def check_output(folder: Path) -> None:
    """Raise ValueError if the folder of a page exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} is not an empty folder; choose another one")


def write(folder: Path, names: Sequence[str], pairs: Sequence[Pair], seed: int) -> Path:
    """Write the page of pairs to a folder; return the path of index.html.

    The seed gives the order of the pairs and the sides. Of the pairs of two methods, each method is
    on the left in half. The page has names only inside a base64 text, which files of votes carry.
    """
    check_output(folder)
    shown = arrange(pairs, seed)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    files = {}
    for run in {run.folder: run for pair in shown for run in pair.runs}.values():
        files[run.folder] = f"videos/{_name(run, seed)}.mp4"
        _link(run.video, folder / files[run.folder])
    key = encode_key({"methods": list(names), "pairs": [pair.methods for pair in shown]})
    page = {
        "format": FORMAT,
        "page": hashlib.sha256(f"{seed} {key} {sorted(files.values())}".encode()).hexdigest()[:16],
        "key": key,
        "pairs": [
            {
                "left": files[pair.runs[0].folder],
                "right": files[pair.runs[1].folder],
                "prompt": pair.runs[0].inputs["prompt"],
            }
            for pair in shown
        ],
    }
    template = importlib.resources.files("framepack_jax") / "assets" / "elo" / "index.html"
    # "</script>" in a prompt would end the script.
    data = json.dumps(page).replace("<", "\\u003c")
    text = template.read_text(encoding="utf-8").replace(PLACE, data)
    atomic_write_text(folder / "index.html", text)
    return folder / "index.html"


def arrange(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Return the pairs in a random order, the first run of each on the left."""
    rng = np.random.default_rng(seed)
    shown: list[Pair] = []
    flips: dict[tuple[int, int], bool] = {}
    for number in rng.permutation(len(pairs)).tolist():
        pair = pairs[number]
        flips[pair.methods] = not flips.get(pair.methods, bool(rng.integers(2)))
        shown.append(Pair(pair.methods[::-1], pair.runs[::-1]) if flips[pair.methods] else pair)
    return shown


def encode_key(key: dict[str, Any]) -> str:
    """Return the methods of each pair as a text that a rater does not read by accident."""
    return base64.b64encode(json.dumps(key).encode()).decode()


def decode_key(text: str) -> dict[str, Any]:
    """Return the key in a text of `encode_key`. Raises ValueError."""
    return json.loads(base64.b64decode(text, validate=True))


def _name(run: Run, seed: int) -> str:
    return hashlib.sha256(f"{seed} {run.folder.resolve()}".encode()).hexdigest()[:16]


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it where that is not possible; dates say nothing about its run."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
