"""The command launch, with programs that fail as training does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framepack_jax.cli import launch
from tests.fixtures.paths import ROOT

# Writes the step of each run, from a list, and ends with the code of the run.
PROGRAM = """
import json, os, pathlib, sys
runs = pathlib.Path(sys.argv[1])
number = int(runs.read_text()) if runs.exists() else 0
runs.write_text(str(number + 1))
step, code = json.loads(sys.argv[2])[number]
with open(os.environ["FRAMEPACK_HEARTBEAT"], "w") as file:
    json.dump({"step": step, "time": 0}, file)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def run(tmp_path: Path, runs: list[tuple[int, int]], *flags: str) -> tuple[int, int]:
    """(exit code, number of runs) of the command over a program with these runs."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [str(tmp_path / "program.py"), str(tmp_path / "runs"), json.dumps(runs)]
    with pytest.raises(SystemExit) as ended:
        launch.main(["--pause-seconds", "0", *flags, "--", *command])
    return ended.value.code, int((tmp_path / "runs").read_text())


@pytest.fixture(autouse=True)
def handlers():
    """Leave the signal handlers of this process as they were."""
    before = {number: signal.getsignal(number) for number in launch.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_command_that_finishes_is_not_started_again(tmp_path) -> None:
    assert run(tmp_path, [(10, 0), (10, 0)]) == (0, 1)


def test_failures_with_new_steps_between_them_are_no_reason_to_give_up(tmp_path, capsys) -> None:
    runs = [(3, 1), (5, -9), (6, 1), (6, 1), (9, 1), (12, 0)]
    assert run(tmp_path, runs) == (0, 6)
    err = capsys.readouterr().err
    assert "the command was ended by SIGKILL at step 5; it starts again in 0 s" in err


def test_it_gives_up_after_failures_at_one_step(tmp_path, capsys) -> None:
    runs = [(3, 1), (8, 1), (7, 1), (8, -6), (9, 0)]
    assert run(tmp_path, runs) == (134, 4)
    said = "gives up after 3 failures without a step after step 8: the command was ended by SIGABRT"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("code", [2, 130, 143])
def test_what_would_come_again_or_was_asked_for_is_the_end(tmp_path, code) -> None:
    assert run(tmp_path, [(3, code), (4, 0)]) == (code, 1)


def test_one_failure_may_be_the_limit(tmp_path) -> None:
    assert run(tmp_path, [(3, 1), (4, 0)], "--max-failures", "1") == (1, 1)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "give a command after --"),
        (["--max-failures", "0", "--", "train.py"], "--max-failures 0: expected"),
    ],
)
def test_bad_input_is_named(args, named) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{named}"):
        launch.main(args)


def test_a_signal_is_passed_on_and_ends_both(tmp_path) -> None:
    program = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "pathlib.Path('ready').touch()\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-m", "framepack_jax", "launch", "--", sys.executable, "-c", program]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=env)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
