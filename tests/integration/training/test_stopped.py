"""Training stopped anywhere and gone on with, by one process."""

import itertools
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from framepack_jax.cli import common, train
from framepack_jax.data import records
from framepack_jax.training import checkpoints, flow_matching_task
from tests.fixtures.training_runs import STEPS, finish, flags, same, start, state_of, wait_for


def test_a_disk_that_fills_leaves_what_is_whole(place, whole) -> None:
    """By a limit on the size of files, which tensorstore meets as it meets a full disk."""
    output, compiled = place / "full", programs(place)
    finish(start(place, output, "--steps", "5"))
    # Of the last checkpoint the run hears when it waits for it, of others when it saves the next.
    for steps in ("6", str(STEPS)):
        process = start(place, output, "--steps", steps, limit=200)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1
        # Threads of orbax write at the same time, so that it need not begin a line.
        (said,) = re.findall("error: a checkpoint in .*", err)
        assert "the newest complete checkpoint is step 5" in said
        assert checkpoints.steps_of(output) == [3, 5]
    finish(start(place, output))
    same(output, whole)
    # With other numbers of steps, it is the same program.
    assert programs(place) == compiled != set()


def programs(place: Path) -> set[str]:
    """The training steps that the runs of this session have compiled."""
    return {file.name for file in (place / "compiled").glob("jit_train_step-*-cache")}


def test_a_disk_that_goes_ends_a_run_before_the_step(place, whole, tmp_path, monkeypatch) -> None:
    """It leaves no trace: the run goes on as if the disk had always been there."""
    output, read, reads = tmp_path / "run", records.VideoSource.__getitem__, itertools.count()

    def gone_after_a_while(source: records.VideoSource, number: int) -> records.Record:
        if next(reads) > 40:
            raise OSError("the disk is gone")
        return read(source, number)

    monkeypatch.setattr(records.VideoSource, "__getitem__", gone_after_a_while)
    with pytest.raises(SystemExit) as left:
        train.main(flags(place, output, "--checkpoints.every", "100"))
    step = checkpoints.steps_of(output)[-1]
    assert 2 < step < STEPS
    assert re.match(
        rf"error: step {step + 1} has no data: the disk is gone.*resume after step {step}",
        str(left.value),
    )  # fmt: skip
    monkeypatch.undo()
    finish(start(place, output))
    same(output, whole)


@pytest.mark.slow
def test_rollouts_go_on_as_if_never_stopped(place, tmp_path) -> None:
    """Stopped after a step that read the true history, before one that predicts it."""
    more = ("--history.rollouts", "0.5", "--history.noisy", "random", "--causal", "--ema", "0")
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    for output, steps in ((stopped, "3"), (stopped, "6"), (whole, "6")):
        train.main(flags(place, output, *more, "--steps", steps))
    same(stopped, whole, step=6)


def test_killed_three_times_it_is_the_run_that_never_was(place, whole) -> None:
    output, rng = place / "killed", np.random.default_rng()
    steps = sorted(rng.choice(np.arange(2, STEPS - 1), 3, replace=False).tolist())
    for step in steps:
        process = start(place, output)
        wait_for(process, output, step)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.kill()
        process.communicate()
    # A checkpoint is on disk some time after its step, or was about to be.
    kept = checkpoints.steps_of(output)
    expected = f"resumes after step {kept[-1]}" if kept else "starts from random weights"
    assert expected in finish(start(place, output))
    same(output, whole)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
def test_a_signal_saves_the_step_and_has_its_exit_code(place, whole, number, code) -> None:
    output = place / f"ended_by_{number}"
    # A run ignores SIGHUP if it is ignored where it starts, as under nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = start(place, output, "--checkpoints.every", "100")
    signal.signal(signal.SIGHUP, before)
    wait_for(process, output, 4)
    process.send_signal(number)
    out = finish(process, code)
    assert "stopped after step" in out and "run the same command again to resume" in out
    (step,) = checkpoints.steps_of(output)
    assert 4 <= step < STEPS
    finish(start(place, output))
    same(output, whole)


def test_a_finished_run_has_nothing_to_do(place, whole) -> None:
    before = state_of(whole)
    out = finish(start(place, whole))
    assert f"resumes after step {STEPS}" in out
    assert all(np.array_equal(a, b) for a, b in zip(before, state_of(whole), strict=True))


@pytest.mark.parametrize("how", ["emptied", "flipped"])
def test_a_damaged_checkpoint_is_set_aside(place, whole, tmp_path, how) -> None:
    """Files without content, as after a power cut; eight flipped bits in the largest file."""
    output = tmp_path / "damaged"
    shutil.copytree(whole, output)
    newest = output / "checkpoints" / str(STEPS)
    files = [file for file in newest.rglob("*") if file.is_file() and file.stat().st_size > 1000]
    if how == "emptied":
        for file in files:
            file.write_bytes(b"")
    else:
        largest = max(files, key=lambda file: file.stat().st_size)
        data = bytearray(largest.read_bytes())
        for place_ in np.random.default_rng(0).integers(len(data) // 2, len(data) - 999, 8):
            data[place_] ^= 16
        largest.write_bytes(data)
    out = finish(start(place, output))
    assert f"warning: checkpoint {STEPS} in" in out
    assert f"it is moved to {output}/damaged/{STEPS}" in out and "resumes after step 9" in out
    assert (output / "damaged" / str(STEPS)).is_dir()
    same(output, whole)


def test_if_no_checkpoint_can_be_restored_nothing_is_moved(place, whole, tmp_path) -> None:
    output = tmp_path / "lost"
    shutil.copytree(whole, output)
    for file in (output / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"")
    process = start(place, output, "--steps", str(STEPS + 1))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in err, err[-3000:]
    assert f"error: checkpoint {STEPS} in" in err and "no older one can; nothing was changed" in err
    assert checkpoints.steps_of(output) == [9, STEPS]


def test_interrupted_before_the_first_step_it_says_so(place, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flow_matching_task, "open_task", interrupted)
    with pytest.raises(SystemExit) as left:
        train.main(flags(place, tmp_path / "a"))
    assert left.value.code == common.INTERRUPTED
    assert "run the same command again to resume" in capsys.readouterr().err
