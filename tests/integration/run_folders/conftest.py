"""Runs and pictures that the tests of run folders share."""

from pathlib import Path

import numpy as np
import pytest

from framepack_jax import FramePack, bundle, packing, video
from framepack_jax.jobs.run_dir import RunDir
from tests.fixtures.run_folders import F1, INVERTED, make


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> dict[str, RunDir]:
    """An uninterrupted run of three sections for each order."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        schedule: make(folder / schedule, "--sections", 3, "--gif", schedule=schedule)
        for schedule in (INVERTED, F1)
    }


@pytest.fixture(scope="module")
def pipe() -> FramePack:
    return FramePack.load(bundle.BUILTIN_BUNDLES["random"], schedule=packing.parse(INVERTED))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> dict[str, Path]:
    """Two pictures unlike the photograph."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("end", "key"):
        coarse = rng.integers(0, 256, (4, 3, 3), dtype=np.uint8)
        video.save_png(folder / f"{name}.png", np.kron(coarse, np.ones((16, 16, 1), np.uint8)))
    return {name: folder / f"{name}.png" for name in ("end", "key")}
