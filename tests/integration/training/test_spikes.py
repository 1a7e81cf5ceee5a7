"""Runs that skip steps with a spike of the gradient."""

import pytest

from framepack_jax.cli import train
from framepack_jax.cli.common import HOPELESS
from tests.fixtures.training_data import write_dataset
from tests.fixtures.training_runs import (
    STEPS,
    flags,
    log_of,
    same,
    state_of,
)

SKIPPING = "--skip-spikes.factor", "10", "--skip-spikes.window", "3"
# A clip with broken latents is in the batches of these steps; the window is full at the second.
FIRST, SECOND = 2, 7


@pytest.fixture(scope="module")
def broken(place) -> tuple[str, ...]:
    """Flags that train on a dataset with one broken clip."""
    write_dataset(place / "broken", {(32, 48): (5,) * 26}, huge=[22])
    return "--data.path", str(place / "broken")


def test_a_spike_is_skipped_also_by_a_run_that_resumes_before_it(place, broken, capsys) -> None:
    """And that reads the norm of each step before the next, as it saves every step."""
    whole, output = place / "spikes", place / "spikes_resumed"
    train.main(flags(place, whole, *broken, *SKIPPING, "--no-export"))
    text = capsys.readouterr()
    assert f"warning: step {SECOND}: the norm of the gradient was " in text.err
    assert "video_11-022" in text.err and "the update is skipped (1 so far)" in text.err
    assert "steps whose update was skipped: 1 of 12" in text.out
    lines = log_of(whole)
    assert [step for step, line in lines.items() if line["skipped"]] == [SECOND]
    assert lines[SECOND]["grad_norm"] > lines[SECOND]["grad_norm_limit"]
    assert lines[FIRST]["grad_norm"] > 10 * lines[1]["grad_norm"]
    assert [step for step, line in lines.items() if "grad_norm_limit" in line] == [*range(5, 13)]
    assert [line["skipped_total"] for line in lines.values()] == [0] * 6 + [1] * 6
    # A run that lost the norms would have no limit for the spike.
    for steps in (SECOND - 1, SECOND + 1, STEPS):
        more = "--checkpoints.every", "1", "--steps", str(steps), "--no-export"
        train.main(flags(place, output, *broken, *SKIPPING, *more))
    assert "resumes after step 8" in capsys.readouterr().out
    same(output, whole)


def test_a_run_without_spikes_is_that_without_the_flag(place, whole) -> None:
    output = place / "no_spikes"
    train.main(flags(place, output, *SKIPPING, "--no-export"))
    assert [line.pop("skipped_total") for line in log_of(output).values()] == [0] * 12
    for ours, theirs in zip(state_of(output), state_of(whole), strict=True):
        assert (ours == theirs).all()


def test_a_run_that_diverges_ends_for_good(place, broken) -> None:
    """`framepack launch` does not start it again."""
    rate = "--optimizer.learning-rate", "10", "--optimizer.warmup-steps", "4"
    with pytest.raises(SystemExit) as error:
        train.main(flags(place, place / "diverged", *SKIPPING, *rate, "--max-skipped-steps", "2"))
    assert error.value.code == HOPELESS
    said = str(error.value)
    assert "10 times the median of 3 steps (--skip-spikes); the batch had clips video_" in said
    assert "The updates of 2 steps in a row were skipped, as many as --max-skipped-steps 2" in said
    assert "the last checkpoint in" in said and "--optimizer.learning-rate" in said
