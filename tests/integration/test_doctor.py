"""`framepack doctor` from end to end, and commands that point to it."""

import json
import os
import subprocess
import sys

import pytest

from framepack_jax.cli import doctor

SLOW = "--skip", "kernels", "--skip", "video"


def run(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "framepack_jax", "doctor", *flags]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


def test_a_machine_that_works(capsys) -> None:
    doctor.main(["--bundle", "random"])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "warning") for line in lines), lines
    subjects = [line.split(": ")[0].split(maxsplit=1)[1] for line in lines]
    assert subjects[0] == "Python" and subjects[-1] == "small video"
    assert {"packages", "devices", "memory", "video", "bundle random"} <= set(subjects)
    assert "attention by xla" in subjects
    assert "37 frames with random" in lines[-1]


def test_json_and_exit_code(tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as left:
        doctor.main(["--json", "--bundle", str(tmp_path / "empty"), "--skip", "machine", *SLOW])
    assert left.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert [each["status"] for each in found][-1] == "problem"
    assert set(found[-1]) == {"subject", "status", "text", "remedy"} and found[-1]["remedy"]


def test_without_devices_nothing_is_run() -> None:
    done = run("--skip", "packages", "--skip", "codecs", JAX_PLATFORMS="nowhere")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("problem  devices: JAX cannot start") for line in lines)
    assert [line.split(":")[0] for line in lines[-3:]] == [
        "skipped  bundle", "skipped  kernels", "skipped  video"
    ]  # fmt: skip


def test_commands_point_to_the_doctor(tmp_path) -> None:
    command = [sys.executable, "-m", "framepack_jax", "sample", "--bundle", "random"]
    command += ["--prompt", "a circle", "--sections", "1", "--output", str(tmp_path / "run")]
    env = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: JAX cannot start: "), done.stderr
    assert last.endswith("framepack doctor says what is wrong")
