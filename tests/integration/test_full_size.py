"""Every network at its released size, with random weights: one section, from prompt to mp4."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import capped
from framepack_jax import video
from framepack_jax.generation import offload_plan
from framepack_jax.generation.offload_plan import GB
from framepack_jax.jobs.run_dir import RunDir
from tests.fixtures.paths import ROOT

# Bytes of the bundle, in 8 bits, with the run; and of memory with all blocks in it: fewer serve,
# but then every step reads the others from the disk.
DISK, MEMORY = 23 * GB, 22 * GB
WINDOW, STEPS, SIDE = 9, 2, 64


@pytest.fixture
def folder(tmp_path):
    """A folder for a bundle that is too large to be kept."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def check_room(folder: Path) -> None:
    """Skip the test if disk or memory cannot hold the bundle."""
    free, host = shutil.disk_usage(folder).free, offload_plan.limit_of_host()
    for needed, there, what in ((DISK, free, f"disk at {folder}"), (MEMORY, host, "memory")):
        if there is not None and there < needed:
            pytest.skip(f"needs {needed / GB:.0f} GB of {what}, {there / GB:.1f} GB are free")


def sampled(bundle: Path, output: Path) -> tuple[str, int]:
    """Return what `sample.py` prints, and the peak memory of its process in bytes."""
    command = [
        sys.executable, str(ROOT / "sample.py"), "--bundle", str(bundle), "--output", str(output),
        "--image", str(ROOT / "examples" / "astronaut.jpg"), "--prompt", "the man smiles",
        "--sections", "1", "--steps", str(STEPS), "--height", str(SIDE), "--width", str(SIDE),
        "--offload", "full",
    ]  # fmt: skip
    # Programs are compiled as users compile them, since that decides what they need.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with open(output.with_suffix(".log"), "w+") as told:
        process = subprocess.Popen(command, env=environment, stdout=told, stderr=told)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        text = told.read()
    assert process.returncode == 0, text[-2000:]
    return text, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.slow
def test_one_section_of_the_released_sizes(folder) -> None:
    """It ends, is finite, and needs the memory that was announced."""
    check_room(folder)
    capped.make_bundle(folder / "bundle", "full", "int8")
    printed, used = sampled(folder / "bundle", folder / "run")
    frames, _ = video.read_mp4(folder / "run" / "video.mp4")
    assert frames.shape == (4 * WINDOW + 1, SIDE, SIDE, 3) and frames.std() > 1
    latents = np.stack(list(RunDir.open(folder / "run").latents().values()))
    assert latents.shape[0] == WINDOW + 1 and np.isfinite(latents).all() and latents.std() > 0.1
    assert "offload full: 0 of 60 blocks stay on the device" in printed
    said = float(re.search(r"([\d.]+) GB are needed", printed)[1]) * GB
    assert 0.8 * said < used < 1.05 * said, f"{used / GB:.1f} GB, said {said / GB:.1f} GB"
