"""Score a video with VBench, for users who have it: its networks measure the whole video, the first
15 % and the last 15 %, so that each dimension has a drift.

VBench (arXiv 2311.17982, package vbench 0.1.5) needs an older PyTorch than this package, so it runs
in an environment of its own, as a process. It downloads its networks when they are first used.
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framepack_jax import video
from framepack_jax.evaluation import vbench_worker
from framepack_jax.evaluation.drift import SHARE
from framepack_jax.evaluation.metrics import Metric

METRICS = {
    "subject_consistency": Metric("VBench subject consistency", "0 to 1", 1),
    "background_consistency": Metric("VBench background consistency", "0 to 1", 1),
    "motion_smoothness": Metric("VBench motion smoothness", "0 to 1", 1, 4),
    "dynamic_degree": Metric("VBench dynamic degree", "0 or 1", 0, 0),
    "aesthetic_quality": Metric("VBench aesthetic quality", "0 to 1", 1),
    "imaging_quality": Metric("VBench imaging quality", "0 to 1", 1),
    "overall_consistency": Metric("VBench overall consistency", "cosine", 1),
}
"""Dimensions that VBench measures of any video; `overall_consistency` compares with a caption."""
OF_CAPTION = "overall_consistency"
# VBench divides its mean over videos by this, but not the score of each video.
SCALES = {"imaging_quality": 100.0}
Scores = dict[str, float]
"""Scores of one dimension by part, and their drift."""
PARTS = ("first 15 %", "last 15 %", "whole video")
MIN_FRAMES = 8
"""Minimum number of frames of a part: VBench compares frames at a distance of 1/8 s."""
INSTALL = (
    "in an environment of its own: torch and torchvision built for CUDA 12.1 or older, then pip"
    " install vbench; give its Python: --vbench ENV/bin/python"
)


def measure(
    python: Path, file: Path, caption: str = "", dimensions: Sequence[str] = ()
) -> dict[str, Scores]:
    """Return the scores of a video by dimension, then by part: `PARTS` and "drift", the absolute
    difference of the first and the last part.

    Args:
        python: interpreter of an environment with VBench.
        dimensions: keys of `METRICS`; default: all, `overall_consistency` if there is a caption.

    Raises ValueError if VBench is not installed there, if it fails, if the video is too short, or
    if a dimension needs a caption.
    """
    dimensions = _checked(dimensions, caption)
    interpreter = shutil.which(python)
    if interpreter is None:
        raise ValueError(f"--vbench {python}: there is no such program; install VBench {INSTALL}")
    info = video.mp4_info(file)
    count = max(1, round(SHARE * info.frames))
    if count < MIN_FRAMES:
        raise ValueError(
            f"--vbench: 15 % of the {info.frames} frames of {file} are {count}; expected at least"
            f" {MIN_FRAMES}, of a video of {math.ceil((MIN_FRAMES - 0.5) / SHARE)} frames"
        )
    with tempfile.TemporaryDirectory() as folder:
        names = _write_parts(Path(folder), file, info, count)
        prompts = dict.fromkeys(names.values(), caption) if caption else {}
        scores = _run(os.path.abspath(interpreter), Path(folder), prompts, dimensions)
    return {
        dimension: _with_drift(
            {part: float(found[name]) / SCALES.get(dimension, 1) for part, name in names.items()}
        )
        for dimension, found in scores.items()
    }


def _checked(dimensions: Sequence[str], caption: str) -> list[str]:
    """Return the dimensions to measure. Raises ValueError."""
    if unknown := [name for name in dimensions if name not in METRICS]:
        raise ValueError(
            f"--vbench-dimensions {unknown[0]}: expected one of {', '.join(METRICS)}; VBench has"
            " others for its own prompts only"
        )
    if OF_CAPTION in dimensions and not caption:
        raise ValueError(f"--vbench-dimensions {OF_CAPTION} compares with a caption: add --caption")
    return list(dimensions) or [name for name in METRICS if caption or name != OF_CAPTION]


def _write_parts(folder: Path, file: Path, info: video.Info, count: int) -> dict[str, str]:
    """Write each part to a file, and return their names. An mp4 file itself is the whole video."""
    names = {part: f"{part.partition(' ')[0]}.mp4" for part in PARTS}
    bounds = dict(zip(PARTS, ((0, count), (info.frames - count, None), (0, None)), strict=True))
    videos = folder / "videos"
    videos.mkdir()
    for part, (start, stop) in bounds.items():
        if stop is None and start == 0 and file.suffix == ".mp4":
            os.symlink(file.resolve(), videos / names[part])
            continue
        frames = itertools.islice(video.read_frames(file), start, stop)
        even = (f[: f.shape[0] // 2 * 2, : f.shape[1] // 2 * 2] for f in frames)
        video.write_mp4(videos / names[part], even, info.fps, crf=1)
    return names


def _run(
    interpreter: str, folder: Path, prompts: Mapping[str, str], dimensions: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Run VBench on the videos of a folder; its messages go to the terminal. Raises ValueError."""
    output = folder / "output"
    output.mkdir()
    request = {
        "folder": str(folder / "videos"), "prompts": prompts, "dimensions": dimensions,
        "output": str(output),
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request))
    # Python imports from the folder of a script first: it must not be that of this package.
    script = shutil.copy(vbench_worker.__file__, folder)
    command = [interpreter, script, str(folder / "request.json")]
    code = subprocess.run(command, cwd=folder, check=False).returncode
    answer = output / "answer.json"
    if code or not answer.exists():
        raise ValueError(f"VBench in {interpreter} ended with exit code {code}; see its messages")
    found = json.loads(answer.read_text())
    if "missing" in found:
        raise ValueError(
            f"--vbench {interpreter}: VBench is not installed there ({found['missing']}); install"
            f" it {INSTALL}"
        )
    return found["scores"]


def _with_drift(scores: Scores) -> Scores:
    first, last, _ = (scores[part] for part in PARTS)
    return scores | {"drift": abs(first - last)}
