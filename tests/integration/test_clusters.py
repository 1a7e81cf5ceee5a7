"""Launch files of examples/clusters: the flags in them exist, and the SLURM script restarts."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from framepack_jax.cli import launch, train
from tests.fixtures.paths import ROOT

CLUSTERS = ROOT / "examples" / "clusters"
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*)")
# Stand-ins: srun runs its command, which ends with CODE, or with 143 on SIGTERM; scontrol notes its
# arguments.
SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "$@" >> scontrol.log\n'
PYTHON = """#!/bin/bash
echo "$@" > python.log
trap "exit 143" TERM
[ "$CODE" = wait ] && while :; do sleep 0.05; done
exit $CODE
"""


@pytest.mark.parametrize("file", sorted(CLUSTERS.iterdir()), ids=lambda file: file.name)
def test_the_flags_of_a_launch_file_exist(file: Path, capsys) -> None:
    text = re.sub(r"\s*\\\s*\n\s*|\n\s+- ", " ", file.read_text())
    command = re.search(r"launch -- (train\.py [^\n&]*)", text)
    assert command, f"{file.name} starts no training"
    known = set()
    for main in (train.main, launch.main):
        with pytest.raises(SystemExit):
            main(["--help"])
        known |= set(FLAG.findall(capsys.readouterr().out))
    named = FLAG.findall(command[1].partition(" resources:")[0])
    assert {"config", "bundle", "data.path", "output", "coordinator-address"} <= {*named}
    assert {*named} <= known
    (config,) = re.findall(r"--config (\S+)", command[1])
    assert (ROOT / config).exists()


def slurm(folder: Path, code: str) -> subprocess.Popen:
    """The SLURM script with stand-ins for the programs of SLURM."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"), "CODE": code,
        "BUNDLE": "bundle", "DATA": "dataset", "RUN": "run", "SLURM_JOB_ID": "4711",
    }  # fmt: skip
    return subprocess.Popen(["bash", str(CLUSTERS / "slurm.sh")], cwd=folder, env=env)


@pytest.mark.parametrize(
    ("code", "requeued"), [("0", False), ("1", False), ("2", False), ("143", True)]
)
def test_slurm_queues_a_stopped_job_again(tmp_path, code, requeued) -> None:
    assert slurm(tmp_path, code).wait(30) == int(code)
    started = (tmp_path / "python.log").read_text()
    assert started.startswith("-m framepack_jax launch -- train.py --config ")
    assert (tmp_path / "scontrol.log").exists() == requeued


def test_slurm_passes_the_time_limit_on(tmp_path) -> None:
    process = slurm(tmp_path, "wait")
    while not (tmp_path / "python.log").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
