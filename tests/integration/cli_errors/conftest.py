"""A finished and a stopped run that tests of errors share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from framepack_jax import bundle
from tests.fixtures.small_run import RANDOM, change_record, command


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """The weights of the bundle are read once: that is most of the time of so small a run."""
    load, kept = bundle.load_params, {}

    def load_params(root: Path, manifest: bundle.Manifest, name: str, **options: object) -> object:
        if Path(root) != RANDOM:
            return load(root, manifest, name, **options)
        key = name, *options.values()
        if key not in kept:
            kept[key] = load(root, manifest, name, **options)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "load_params", load_params)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run of two sections."""
    folder = tmp_path_factory.mktemp("whole")
    command(folder)
    return folder


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    """Return the run as if it had been stopped just before its end."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    change_record(folder, status="interrupted")
    return folder
