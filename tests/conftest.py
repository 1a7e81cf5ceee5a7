"""Settings of every test: CPU, no network, strict broadcasting, and where the golden data lie."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


GOLDEN = Path(os.environ.get("FRAMEPACK_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers made by the original implementations."""
    return GOLDEN
