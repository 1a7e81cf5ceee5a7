"""A run that nobody watches: it hangs, its terminal is closed, it is told to stop while it compiles
or validates; and checkpoints by the clock."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from framepack_jax.training import checkpoints, goodput
from tests.fixtures.paths import ROOT
from tests.fixtures.training_runs import STEPS, flags, start, state_of, wait_for

# The training command in which something stands still or takes long. {how} is a line of Python.
PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
{how}
from framepack_jax.cli import train
train.main(sys.argv[1:])
"""
HANGING_READ = """
from framepack_jax.data import records
read, reads = records.VideoSource.__getitem__, []
def stuck(source, number):
    reads.append(number)
    if len(reads) > 30:
        time.sleep(1000)
    return read(source, number)
records.VideoSource.__getitem__ = stuck
"""
SLOW_COMPILING = """
from framepack_jax.training import trainer
compiling = trainer.compile_steps
def slow(*args):
    print("compiles", flush=True)
    time.sleep(1000)
trainer.compile_steps = slow
"""
SLOW_EXPORT = """
from framepack_jax.cli import training
def slow(*args, **options):
    print("exports", flush=True)
    time.sleep(1000)
training.export_run = slow
"""
SLOW_SAVE = """
from orbax.checkpoint._src.checkpointers import async_checkpointer
writing = async_checkpointer._background_wait_for_commit_futures
def slow(*args, **options):
    print("saves", flush=True)
    time.sleep(2)
    writing(*args, **options)
async_checkpointer._background_wait_for_commit_futures = slow
"""
SLOW_VALIDATION = """
from framepack_jax.training import validation, watchdog
allow = watchdog.Watchdog.allow
def told(dog, what):
    print("allows", what, flush=True)
    allow(dog, what)
watchdog.Watchdog.allow = told
called = validation.paired
def slow(losses_at, *args):
    def at(*each):
        print("validates", flush=True)
        time.sleep(0.5)
        return losses_at(*each)
    return called(at, *args)
validation.paired = slow
"""


def start_with(how: str, place, output, *more: str) -> subprocess.Popen:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    program = PROGRAM.format(root=str(ROOT), how=how)
    return subprocess.Popen(
        [sys.executable, "-c", program, *flags(place, output, *more)],
        env=env, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_hang_ends_the_run_with_the_stacks_of_all_threads(place) -> None:
    output = place / "hung"
    process = start_with(HANGING_READ, place, output, "--watchdog-seconds", "4")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    found = re.search(r"error: step (\d+) has taken (\d+) s, more than the 4 s", err)
    assert found and 1 < int(found[1]) <= STEPS and int(found[2]) < 10
    assert "in stuck" in err and "most recent call first" in err


def test_without_a_terminal_it_saves_by_the_clock(place, whole) -> None:
    """Both streams lose their reader after the first line."""
    output = place / "closed"
    clock = "--checkpoints.every", "100", "--checkpoints.minutes", "1e-9", "--checkpoints.keep", "9"
    process = start(place, output, *clock, "--log-every", "4", "--profile", "3:4")
    assert process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(300) == 0
    for ours, theirs in zip(state_of(output), state_of(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert checkpoints.steps_of(output) == [4, 8, STEPS]
    assert list((output / "profile").rglob("*.xplane.pb"))
    (life,) = goodput.read_lives(output)
    assert (life["first"], life["last"]) == (0, STEPS) and life["seconds"]["step"] > 0
    beat = json.loads((output / "heartbeat.json").read_text())
    assert 1 <= beat["step"] <= STEPS and time.time() - beat["time"] < 600


@pytest.mark.parametrize(("how", "line"), [(SLOW_COMPILING, "compiles"), (SLOW_EXPORT, "exports")])
def test_a_signal_ends_what_has_nothing_to_save_within_seconds(place, tmp_path, how, line) -> None:
    process = start_with(how, place, tmp_path / "run")
    _until(process, line)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 143 and "run the same command again to resume" in err


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(place, tmp_path) -> None:
    """And for that of the step in which it came."""
    output = tmp_path / "run"
    process = start_with(SLOW_SAVE, place, output)
    _until(process, "saves")
    assert not checkpoints.steps_of(output)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err[-3000:]
    first, last = checkpoints.steps_of(output)
    assert first == 3 < last < STEPS and f"stopped after step {last} of {STEPS}" in out


def test_a_signal_ends_a_validation_and_the_step_is_saved(place, tmp_path) -> None:
    output = tmp_path / "run"
    every = "--validation.every", "6", "--validation.videos", "0"
    process = start_with(SLOW_VALIDATION, place, output, *every, "--checkpoints.every", "100")
    _until(process, "validates")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143, err[-3000:]
    assert "stopped after step 6 of 12, which is saved" in out
    # The last checkpoint may take longer than a step.
    assert "allows saving step 6\n" in out
    assert checkpoints.steps_of(output) == [6]


def test_the_time_to_stop_may_be_limited(place, tmp_path) -> None:
    """The write of the checkpoint takes too long."""
    how = "from framepack_jax.training import checkpoint_writer\n"
    how += "checkpoint_writer.CheckpointWriter.save = lambda *_: time.sleep(1000)"
    process = start_with(
        how, place, tmp_path / "run", "--checkpoints.every", "100", "--stop-seconds", "2"
    )
    wait_for(process, tmp_path / "run", 4)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143


def _until(process: subprocess.Popen, line: str) -> None:
    for found in process.stdout:
        if found.strip() == line:
            return
    raise AssertionError(process.communicate())
