"""Settings of every test: CPU, no network, strict broadcasting, and where the golden data lie."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import jax
import pytest

from tests.fixtures.compiling import quick_flags
from tests.fixtures.paths import GOLDEN

# Half of the suite's time would be compilation; `XLA_FLAGS= make test` compiles as users do.
os.environ.setdefault("XLA_FLAGS", quick_flags())

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers made by the original implementations."""
    return GOLDEN


# Files that take a minute or more come first, so that no process is left alone with one at the end.
LONG = (
    "test_training_run", "test_interrupt", "test_training", "test_processes", "test_sharding",
    "test_mesh", "test_dry_run", "test_conversion", "test_prepare", "test_sampler",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)

    items.sort(key=place)
