"""Disk space, and what interrupted exports and killed conversions leave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from framepack_jax import __main__ as cli
from framepack_jax import bundle
from framepack_jax.conversion import engine, export
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest
from framepack_jax.conversion.weight_files import ConversionError
from tests.fixtures.paths import ROOT

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch


def test_a_full_disk_is_told_before(framepack_bundle, tmp_path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 1_000})
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda folder: usage)
    for target in ("out", "out.safetensors"):
        with pytest.raises(SystemExit, match=r"needs 0\.0\d* GB, and 0\.0\d* GB are free"):
            cli.main(["export", str(tmp_path / "deep" / target), "--bundle", framepack_bundle])
    source = Path(framepack_bundle).parent / "source"
    with pytest.raises(ConversionError, match="are free there"):
        make_bundle(BundleRequest(output=str(tmp_path / "bundle"), transformer=source))
    assert list(tmp_path.iterdir()) == []
    size = bundle.stored_bytes(
        framepack_bundle, bundle.read_manifest(framepack_bundle), "transformer"
    )
    usage.free = size
    make_bundle(BundleRequest(output=str(tmp_path / "bundle"), transformer=source))
    # What an old bundle takes comes back before its place is needed.
    usage.free = 10_000
    make_bundle(BundleRequest(output=str(tmp_path / "bundle"), transformer=source, overwrite=True))


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_what_a_stopped_export_left_makes_room(
    target, framepack_bundle, tmp_path, monkeypatch
) -> None:
    partial = tmp_path / f".{target}.partial"
    if target == "out":
        partial.mkdir()
    else:
        partial.write_bytes(b"half")
    there = []
    monkeypatch.setattr(engine, "check_space", lambda *_: there.append(partial.exists()))
    cli.main(["export", str(tmp_path / target), "--bundle", framepack_bundle])
    assert there == [False]


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_an_interrupted_export_leaves_nothing_with_its_name(
    target, framepack_bundle, tmp_path, monkeypatch
) -> None:
    args = ["export", str(tmp_path / target), "--bundle", framepack_bundle]
    monkeypatch.setattr(export, "SHARD", 30_000)
    invert, calls = export.invert, iter(range(60))

    def power_cut(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return invert(*args)

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="130"):
        patched.setattr(export, "invert", power_cut)
        cli.main(args)
    assert not (tmp_path / target).exists()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name == f".{target}.partial"
    cli.main(args)
    assert [path.name for path in tmp_path.iterdir()] == [target]


# Children of one process, each killed at a write of its own: the leaves of a plan are counted.
KILLED = """
import os, random, sys
from pathlib import Path
from framepack_jax import bundle
from framepack_jax.bundle import writer
from framepack_jax.conversion import engine
from framepack_jax.conversion.make_bundle import make_bundle
from framepack_jax.conversion.request import BundleRequest

source, output = sys.argv[1:]
request = BundleRequest(output=output, transformer=Path(source))
leaves = engine.ConversionJob.leaves
writer.WRITE_CHUNK = 5_000

def cut_after(count):
    def cut(self, dtype=None):
        for number, leaf in enumerate(leaves(self, dtype)):
            if number == count:
                os.kill(os.getpid(), 9)
            yield leaf
        if count < 0:
            bundle.write_manifest = lambda *_: os.kill(os.getpid(), 9)
    return cut

points = [*random.Random(0).sample(range(76), 2), -1]
for point in points:
    child = os.fork()
    if child == 0:
        engine.ConversionJob.leaves = cut_after(point)
        make_bundle(request)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"not killed at {point}"
    try:
        bundle.read_manifest(output)
    except bundle.BundleError:
        continue
    raise AssertionError(f"killed at {point}, it looks finished")
make_bundle(request)
"""


def test_killed_at_any_point_nothing_looks_finished(framepack_bundle, tmp_path) -> None:
    source = Path(framepack_bundle).parent / "source"
    output = tmp_path / "bundle"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(source), str(output)],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True, timeout=300,
    )  # fmt: skip
    ours, whole = (
        bundle.read_manifest(root).roles["transformer"] for root in (output, framepack_bundle)
    )
    assert ours.source["sha256"] == whole.source["sha256"]
