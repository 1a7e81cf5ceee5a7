"""Two processes that make one video: real ones, on loopback."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from socket import gethostname

import numpy as np
import pytest

from framepack_jax import bundle, video
from framepack_jax.cli import common, sample
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.parallel import multihost
from tests.fixtures.hosts import ended, launch
from tests.fixtures.paths import ROOT
from tests.fixtures.torch_reference import relative_error

FLAGS = (
    "--bundle", "random", "--prompt", "waves", "--schedule", "f1k1_x_f16k4f2k2f1k1_g2",
    "--sections", "3", "--steps", "30", "--height", "32", "--width", "48", "--crf", "1",
)  # fmt: skip
TALK = """
import sys
import jax, numpy as np
from framepack_jax.jobs.loading import check_bundle
from framepack_jax.parallel import multihost
from framepack_jax.generation.results import NotFinite
from framepack_jax.training.stop_signal import StopSignal

me = int(sys.argv[-1])
multihost.join(sys.argv[1], 2, me)

def fails(error):
    raise error

def told(call, *args):
    try:
        return call(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(multihost.on_primary(lambda: {"from": me, "big": "x" * 9000})["from"])
print(told(multihost.on_primary, fails, OSError(f"full in {me}")))
print(told(multihost.on_primary, fails, NotFinite(f"no number in {me}", [1])))
print(multihost.on_all_hosts(lambda: me))
print(told(multihost.on_all_hosts, lambda: me and fails(ValueError(f"missing in {me}"))))
print(multihost.on_all_hosts(lambda: multihost.on_primary(lambda: 10 + me)))
print(told(multihost.assert_same_on_hosts, "the seeds", 1, np.arange(3)))
print(told(multihost.assert_same_on_hosts, "the seeds", me, np.arange(3)))
print(told(multihost.assert_same_facts, dict, {"rate": 1e-3, "seed": 0}))
facts = {"rate": 1e-3 * (1 + me), "seed": 7 * me, "steps": 3}
print(told(multihost.assert_same_facts, dict, facts))
print(told(check_bundle, "bundle_0"), told(check_bundle, f"bundle_{me}"))
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
with jax.set_mesh(mesh):
    whole = multihost.place(np.arange(4.0))
    halves = jax.jit(
        lambda x: 2 * x,
        out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")),
    )(whole)
    mine = halves.addressable_data(0).tolist()
print(mine, (multihost.fetch(halves) + 1).tolist())

print(told(multihost.on_all_hosts, fails, TimeoutError("in vain") if me == 0 else OSError("full")))
with StopSignal() as stop, stop.unsaved():
    if me:
        stop.request()
    calls = 1
    while not stop.called():
        calls += 1
print("stops", calls, stop.received)
"""


def sample_in(folders: list[Path], *flags: str) -> list[subprocess.Popen]:
    return launch(folders, str(ROOT / "sample.py"), *flags, *cluster(folders))


def cluster(folders: list[Path]) -> tuple[str, ...]:
    return "--coordinator-address", "localhost:{port}", "--num-processes", str(len(folders))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> list[Path]:
    """A working folder for each of two processes, with the same image in both."""
    folders = [tmp_path_factory.mktemp("host") for _ in range(2)]
    for folder in folders:
        (folder / "image.jpg").symlink_to(ROOT / "examples" / "astronaut.jpg")
    return folders


@pytest.fixture(scope="module")
def stopped(hosts) -> list[tuple[int, str, str]]:
    """A run of which the second process was told to stop after the first section."""
    started = sample_in(hosts, *FLAGS, "--image", "image.jpg", "--output", "run")
    first = hosts[0] / "run" / "latents" / "section_000.npz"
    while not first.exists() and started[0].poll() is None:
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    return ended(started)


@pytest.fixture(scope="module")
def resumed(hosts, stopped) -> list[tuple[int, str, str]]:
    """And gone on with, the blocks in the memory of two hosts."""
    resume = "-m", "framepack_jax", "resume", "run", "--offload", "full"
    return ended(launch(hosts, *resume, *cluster(hosts)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> RunDir:
    folder = tmp_path_factory.mktemp("alone")
    image = str(ROOT / "examples" / "astronaut.jpg")
    sample.main([*FLAGS, "--image", image, "--output", str(folder)])
    return RunDir.open(folder)


def test_a_signal_to_one_stops_both(stopped) -> None:
    assert [code for code, *_ in stopped] == [common.TERMINATED] * 2, stopped
    assert "interrupted; finished sections are kept" in stopped[0][2]


def test_two_processes_make_the_video_of_one(hosts, resumed, alone) -> None:
    assert [code for code, *_ in resumed] == [0, 0], resumed
    run = RunDir.open(hosts[0] / "run")
    assert run.record["status"] == "finished"
    for position, z in alone.latents().items():
        assert relative_error(run.latents()[position], z) < 1e-4
    ours, theirs = (
        np.stack(list(video.read_frames(r.folder / "video.mp4"))).astype(int) for r in (run, alone)
    )
    # The encoder loses little at this crf, so that a rounding before it is no more after it.
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).mean() < 0.5


def test_one_of_them_writes(hosts, resumed) -> None:
    assert (hosts[0] / "run" / "video.mp4").exists()
    assert [path.name for path in hosts[1].iterdir()] == ["image.jpg"]
    assert "video.mp4: 25 frames" in resumed[0][1]
    assert not _lines(resumed[1])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--image", "only_here.jpg"), "only_here.jpg"),
        (("--image", "image.jpg", "--bundle", "only_here"), "only_here is not a bundle"),
        (("--jobs", "jobs.jsonl"), "the jobs of process 1 differ from those of process 0"),
    ],
)
def test_what_fails_in_one_ends_both(tmp_path, flags, named) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for steps, folder in enumerate(folders, start=1):
        folder.mkdir()
        (folder / "image.jpg").symlink_to(ROOT / "examples" / "astronaut.jpg")
        (folder / "jobs.jsonl").write_text(json.dumps({"prompt": "waves", "steps": steps}))
    (folders[0] / "only_here.jpg").symlink_to(ROOT / "examples" / "astronaut.jpg")
    (folders[0] / "only_here").symlink_to(ROOT / "framepack_jax" / "assets" / "random")
    for code, _, errors in ended(sample_in(folders, *FLAGS, *flags, "--output", "run")):
        assert code == 1, errors
        assert "error: " in errors and named in errors and "Traceback" not in errors
    assert not any((folder / "run").exists() for folder in folders)


def test_results_and_errors_are_told(tmp_path) -> None:
    for number, digest in enumerate("ab"):
        shutil.copytree(bundle.BUILTIN_BUNDLES["random"], tmp_path / f"bundle_{number}")
        file = tmp_path / f"bundle_{number}" / bundle.MANIFEST
        manifest = json.loads(file.read_text())
        manifest["roles"]["vae"]["source"]["sha256"] = 64 * digest
        file.write_text(json.dumps(manifest))
    first, second = ended(launch([tmp_path] * 2, "-c", TALK, "localhost:{port}", number=""))
    assert first[0] == second[0] == 0, (first, second)
    shared = [
        "0",
        "OSError: full in 0",
        "RuntimeError: NotFinite: no number in 0",
        None,
        "ValueError: missing in 1",
        None,
        "None",
        "ValueError: the seeds of process 1 differ from those of process 0; give all processes the"
        " same",
        "None",
        f"ValueError: processes differ: rate = 0.001 in process 0 on {(host := gethostname())},"
        f" 0.002 in process 1 on {host}; seed = 0 in process 0 on {host}, 7 in process 1 on {host};"
        " give all processes the same",
        "None ValueError: the weights of the bundle of process 1 differ from those of process 0;"
        " give all processes the same",
    ]
    # After the same number of questions, without a signal from outside.
    stops = _lines(first)[-1]
    assert re.fullmatch(r"stops \d+ None", stops)
    assert _lines(first) == [
        *shared[:3],
        "0",
        shared[4],
        "10",
        *shared[6:],
        "[0.0, 2.0] [1.0, 3.0, 5.0, 7.0]",
        "OSError: full",
        stops,
    ]
    assert _lines(second) == [
        *shared[:3],
        "1",
        shared[4],
        "11",
        *shared[6:],
        "[4.0, 6.0] [1.0, 3.0, 5.0, 7.0]",
        "OSError: full",
        stops,
    ]


def _lines(result: tuple[int, str, str]) -> list[str]:
    return [line for line in result[1].splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num-processes": "2"}, "--num-processes and --process-id need --coordinator-address"),
        ({"coordinator-address": "somewhere"}, "coordinator 'somewhere': expected HOST:PORT"),
        (
            {"coordinator-address": "here:1", "num-processes": "2"},
            "process None of 2 processes",
        ),
        (
            {"coordinator-address": "here:1", "num-processes": "2", "process-id": "2"},
            "process 2 of 2",
        ),
    ],
)
def test_numbers_that_do_not_go_together(values, named) -> None:
    flags = [f"--{name}={value}" for name, value in values.items()]
    with pytest.raises(SystemExit, match=f"error: .*{named}"):
        sample.main(["--bundle", "random", *flags])


def test_one_process_talks_to_nobody() -> None:
    assert multihost.is_primary() and not multihost.stopping()
    assert multihost.on_primary(max, 1, 2) == multihost.on_all_hosts(max, 1, 2) == 2
    multihost.assert_same_on_hosts("anything", 1)
