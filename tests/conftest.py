"""Settings of every test: CPU, no network, strict broadcasting, bounded memory, the golden data."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiled programs are shared by all processes of one run. To keep them for the next run, name a
# folder in JAX_COMPILATION_CACHE_DIR.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/framepack_jax_compiled_{os.getpid()}"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.fixtures import assets, memory, suite
from tests.fixtures.compiling import quick_flags
from tests.fixtures.faulty_store import faulty_store  # noqa: F401
from tests.fixtures.mounts import mount  # noqa: F401
from tests.fixtures.object_store import bucket, object_store, s3_bucket, s3_store  # noqa: F401
from tests.fixtures.paths import GOLDEN

# Half of the suite's time would be compilation; `XLA_FLAGS= make test` compiles as users do.
os.environ.setdefault("XLA_FLAGS", quick_flags())

jax.config.update("jax_numpy_rank_promotion", "raise")
# As in `framepack_jax.cli`.
gc.set_threshold(100_000, 20, 20)
assets.read_once()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers made by the original implementations."""
    return GOLDEN


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """Read no program from the compilation cache, in tests that look into compiled programs."""
    _use_cache(False)
    yield
    _use_cache(True)


def _use_cache(used: bool) -> None:
    wanted = os.environ.get("JAX_ENABLE_COMPILATION_CACHE") != "0"
    jax.config.update("jax_enable_compilation_cache", used and wanted)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def bounded_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drop what files have compiled once it is much, and note the most memory that each took."""
    memory.reset_peak()
    # Dry runs turn it off.
    _use_cache(True)
    yield
    request.config.stash[suite.PEAKS][suite.name_of(request.path)] = memory.peak()
    memory.release_if_grown()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """Drop what earlier tests of a file have compiled once it is too much."""
    result = yield
    memory.release_if_large()
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of processes that have a core and enough memory."""
    return memory.worker_count()


def pytest_configure(config: pytest.Config) -> None:
    """Begin to measure the run."""
    config.stash[suite.PEAKS] = {}
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(suite.Worker(config))
        return
    # Keep the order that `sort_slowest_first` gives.
    config.option.loadscopereorder = False
    config.pluginmanager.register(suite.Report(config))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the programs that this run compiled, if their folder is named after it."""
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if folder.endswith(f"framepack_jax_compiled_{os.getpid()}"):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the files, and mark tests by what they need."""
    suite.mark_by_file(items)
    suite.sort_slowest_first(config, items)
