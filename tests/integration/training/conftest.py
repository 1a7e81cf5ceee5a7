"""Batches and runs that the tests of training share."""

import pytest

from tests.fixtures.training_data import write_dataset
from tests.fixtures.training_runs import CONFIG, STEPS, finish, log_of, start
from tests.fixtures.training_steps import batches as batches


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a dataset, a configuration, and programs compiled so far."""
    folder = tmp_path_factory.mktemp("runs")
    write_dataset(folder / "dataset", {(32, 48): (7, 9, 5, 5, 7, 3)})
    (folder / "config.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="session")
def whole(place):
    """A run that was never stopped, in a folder named as people name it: relative."""
    output = place / "whole"
    finish(start(place, output.name))
    assert sorted(log_of(output)) == list(range(1, STEPS + 1))
    return output
