"""A run on two datasets."""

import re

import numpy as np
import pytest

from framepack_jax.cli import train
from framepack_jax.training import checkpoints
from tests.fixtures.training_data import write_dataset
from tests.fixtures.training_runs import flags, log_of, state_of


def test_a_run_on_two_datasets_resumes_exactly(place, capsys) -> None:
    """It names both before the first step, validates each, and refuses other weights."""
    write_dataset(place / "second", {(32, 48): (5, 7, 3, 9)})
    two = ("--data.path", str(place / "dataset"), str(place / "second"), "--no-export",
           "--validation.every", "4", "--validation.samples", "4", "--validation.videos", "0",
           "--validation.sigmas", "0.5", "--optimizer.warmup-steps", "0")  # fmt: skip
    weights = ("--data.weights", "0.25", "0.75")
    whole, stopped = place / "mixture", place / "mixture_stopped"
    train.main(flags(place, whole, *two, *weights, "--steps", "4"))
    said = capsys.readouterr().out
    assert re.search(r"/dataset: 4 clips .*; 0.25 of the batches, 2 more .*; 1 epochs", said)
    assert re.search(r"/second: 2 clips .*; 0.75 of the batches, 2 more .*; 6 epochs", said)
    losses = log_of(whole)[4]
    each = [losses[f"validation/loss_of_{name}"] for name in ("dataset", "second")]
    assert each[0] != each[1]
    np.testing.assert_allclose(np.mean(each), losses["validation/loss"], rtol=1e-6)
    train.main(flags(place, stopped, *two, *weights, "--steps", "2", "--validation.every", "0"))
    train.main(flags(place, stopped, *two, "--data.weights", "1", "3", "--steps", "4"))
    assert log_of(stopped) == log_of(whole)
    for ours, theirs in zip(state_of(stopped, 4), state_of(whole, 4), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    record = checkpoints.read_record(whole)
    assert record["fingerprint"]["weights"] == [1, 3]
    assert record["config"]["data"]["path"][1] == str(place / "second")
    with pytest.raises(SystemExit, match=r"weights = \[1, 3\] then, \[1, 1\] now.*--init RUN@STEP"):
        train.main(flags(place, whole, *two, "--data.weights", "1", "1", "--steps", "6"))
