"""What has been made and measured so far, in the folder of an evaluation.

evaluation.json                 what was asked for: another evaluation does not go on from it
videos/PART/ROW/NAME.mp4, .npz  a video, and the figures of its frames as they were before they
                                were encoded; the .npz is written last
"""

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from framepack_jax.toy.scenes import Case, Figures
from framepack_jax.utils.compare import THERE_HERE, differences
from framepack_jax.utils.files import atomic_write
from framepack_jax.utils.messages import shorten
from framepack_jax.video import write_mp4

SETTINGS = "evaluation.json"
FORMAT = 1


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, or go on with it. Raises ValueError where it holds an evaluation of other
    settings, or other files; rows may be added."""
    file = folder / SETTINGS
    record: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **settings}))
    if file.exists():
        there = _read(file)
        rows = there.get("rows", {}) | record["rows"]
        if differing := _differences(there, record):
            raise ValueError(
                f"--output {folder} holds an evaluation of other settings ({differing}); choose"
                " another folder"
            )
        record["rows"] = rows
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--output {folder} is no evaluation and not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); choose another --output") from error


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    names = sorted((there.keys() | here.keys()) - {"rows"})
    found = differences(there, here, names, THERE_HERE)
    rows = there.get("rows", {})
    found += [
        f"{name} is of other weights there"
        for name, row in here["rows"].items()
        if rows.get(name, row) != row
    ]
    return shorten(found)


def file_name(row: str) -> str:
    """The name of a row as a file has it."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", row).strip("_")


def video_file(folder: Path, row: str, case: Case) -> Path:
    """Where a video lies."""
    return folder / "videos" / case.part / file_name(row) / f"{case.name}.mp4"


def load(folder: Path, row: str, case: Case) -> Figures | None:
    """The figures of a video, None where it is not there yet."""
    file = video_file(folder, row, case).with_suffix(".npz")
    if not file.exists():
        return None
    try:
        with np.load(file) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read ({error}); delete it to make it again") from error


def save(
    folder: Path, row: str, case: Case, frames: np.ndarray, figures: Figures, fps: float
) -> None:
    """Keep a video and its figures."""
    file = video_file(folder, row, case)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(file, frames, fps)
    with atomic_write(file.with_suffix(".npz")) as partial, open(partial, "wb") as opened:
        arrays: dict[str, Any] = dict(figures)
        np.savez_compressed(opened, **arrays)
