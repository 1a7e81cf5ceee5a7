"""Training on a dataset one of whose clips cannot be read."""

import json
import re

import pytest

from framepack_jax.cli import train
from framepack_jax.data import holdout
from framepack_jax.data.records import read_index
from framepack_jax.training import checkpoints
from tests.fixtures.training_data import damage, write_dataset
from tests.fixtures.training_runs import STEPS, finish, flags, log_of, same, start


@pytest.fixture(scope="module")
def damaged(place, whole):
    """A dataset one of whose clips cannot be read, and a run on it that was never stopped; its
    number in the dataset."""
    folder = place / "damaged"
    made = write_dataset(folder, {(32, 48): (7, 9, 5, 5, 7, 3)})
    held = set(holdout.split(read_index(folder), 2)[1])
    number = min(set(range(6)) - held)
    damage(folder, made[number])
    output = place / "damaged_whole"
    return folder, output, number, finish(start(place, output, "--data.path", str(folder)))


def test_a_run_says_what_it_will_do(damaged) -> None:
    out = damaged[-1].splitlines()
    assert out[1] == (
        "data         4 clips in 1 bucket (32x48: 4), 2 more held out; 12 epochs in the whole run"
    )
    assert re.fullmatch(r"trained      ([\d,]+) of \1 parameters", out[2])
    assert out[3:5] == [
        "batch        4 samples on one device",
        "steps        1 to 12; the first checkpoint comes after step 3, no validation"
        " (--validation.every 0)",
    ]
    size = r"[\d.]+ (kB|MB)"
    assert re.fullmatch(
        rf"state        {size} on each device: parameters {size}, optimizer {size}, moving average"
        rf" {size}",
        out[5],
    )
    assert out[6].startswith("compiling    1 program of the step")
    assert re.fullmatch(
        rf"memory       {size} on each device in a step: state, weights and batch {size}, temporary"
        rf" {size}",
        out[7],
    )


def test_a_clip_that_cannot_be_read_is_replaced_and_named(place, damaged) -> None:
    """One more than may be ends the run with a checkpoint; it goes on as if it never had ended."""
    folder, whole, number, out = damaged
    path = read_index(folder).shards[0].path
    name = f"{folder}/{path}, record {number}, cannot be read"
    assert f"clips that could not be read and were replaced: {name}" in out
    seen = [step for step, line in log_of(whole).items() if line.get("unread_clips") == 1]
    assert seen == list(range(seen[0], STEPS + 1))
    output = place / "damaged_stopped"
    more = "--data.path", str(folder), "--data.max-bad-records", "0"
    process = start(place, output, *more, "--checkpoints.every", "100")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"warning: step {seen[0]}: {name}" in err
    step = checkpoints.steps_of(output)[-1]
    assert re.search(
        rf"error: 1 clips cannot be read, more than --data.max-bad-records 0: {name}"
        rf" .*step {step} is saved; .* give --data.max-bad-records 1 or more", err,
    )  # fmt: skip
    assert seen[0] <= step <= seen[0] + 1
    with pytest.raises(SystemExit, match=r"more than --data\.max-bad-records 0"):
        train.main(flags(place, output, *more))
    finish(start(place, output, "--data.path", str(folder)))
    same(output, whole)


def test_rates_are_of_the_time_that_steps_take(place, damaged) -> None:
    """Also of a line a step, beside checkpoints: no step waits longer than it takes."""
    lines = [json.loads(line) for line in (damaged[1] / "log.jsonl").read_text().splitlines()]
    assert all(0 <= line["data_wait_fraction"] <= 1 for line in lines)
    for line in lines:
        assert line["samples_per_second"] * line["seconds_per_step"] == pytest.approx(4)
