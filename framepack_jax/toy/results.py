"""Save and load the results of an evaluation.

evaluation.json                  settings; an evaluation resumes only with equal settings
videos/SUITE/ROW/NAME.mp4, .npz  a video and its metrics, measured on the frames before encoding;
                                 the .npz is written last
timings.jsonl                    a line for each batch of videos: how long it took
"""

import contextlib
import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from framepack_jax.toy.scenes import Case, Figures
from framepack_jax.utils.compare import THERE_HERE, differences, differing_fields
from framepack_jax.utils.files import atomic_write
from framepack_jax.utils.messages import shorten
from framepack_jax.video import write_mp4

SETTINGS, TIMINGS = "evaluation.json", "timings.jsonl"
FORMAT = 1


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Create the folder of an evaluation, or resume it. A resumed evaluation may add rows.

    Raises ValueError if the folder holds an evaluation with other settings, or other files.
    """
    file = folder / SETTINGS
    record: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **settings}))
    if file.exists():
        there = _read(file)
        rows = there.get("rows", {}) | record["rows"]
        if differing := _differences(there, record):
            raise ValueError(
                f"--output {folder} holds an evaluation with other settings ({differing}); choose"
                " another folder"
            )
        record["rows"] = rows
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"--output {folder} is not empty and holds no evaluation; choose another folder"
        )
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
    for name, row in here["rows"].items():
        if differing := differing_fields(rows.get(name, row), row):
            found.append(f"{name} has other {' and '.join(differing)} there")
    return shorten(found)


def file_name(row: str) -> str:
    """Return the name of a row as a folder name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", row).strip("_")


def video_file(folder: Path, row: str, case: Case) -> Path:
    """Return the path of a video."""
    return folder / "videos" / case.part / file_name(row) / f"{case.name}.mp4"


def load(folder: Path, row: str, case: Case) -> Figures | None:
    """Load the metrics of a video; return None if it is not saved yet."""
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
    """Save a video and its metrics."""
    file = video_file(folder, row, case)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(file, frames, fps)
    with atomic_write(file.with_suffix(".npz")) as partial, open(partial, "wb") as opened:
        arrays: dict[str, Any] = dict(figures)
        np.savez_compressed(opened, **arrays)


def note_time(folder: Path, row: str, frames: int, seconds: float) -> None:
    """Note that sampling and decoding a batch, of `frames` frames in all, took so long."""
    with open(folder / TIMINGS, "a") as file:
        file.write(json.dumps({"row": row, "frames": frames, "seconds": seconds}) + "\n")


def seconds_per_frame(folder: Path, row: str) -> float:
    """Return the time of a frame in the fastest batch of a row, since the first batches include
    compiling; nan without a batch."""
    found = [math.nan]
    file = folder / TIMINGS
    for line in file.read_text().splitlines() if file.exists() else ():
        # A killed process may have left half of a line.
        with contextlib.suppress(ValueError):
            batch = json.loads(line)
            found += [batch["seconds"] / batch["frames"]] * (batch["row"] == row)
    return float(np.nanmin(found)) if len(found) > 1 else math.nan
