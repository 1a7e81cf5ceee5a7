"""`framepack bench`: figures of a small bundle, and parts that cannot be measured."""

import json

import jax
import pytest

from framepack_jax.bench import memory, report, run
from framepack_jax.bench.result import Result
from framepack_jax.cli import bench
from framepack_jax.parallel import chips

FLAGS = ["--bundle", "random", "--size", "32x32", "--steps", "1"]


@pytest.fixture(autouse=True)
def briefly(monkeypatch) -> None:
    monkeypatch.setattr("framepack_jax.bench.timing.MIN_SECONDS", 0.0)
    monkeypatch.setattr("framepack_jax.bench.timing.ROUNDS", 1)


def test_all_parts_make_one_row_and_a_file(tmp_path, capsys) -> None:
    bench.main([*FLAGS, "--json", str(tmp_path / "bench.json")])
    printed = capsys.readouterr().out
    heading, _, row = (line for line in printed.splitlines() if line.startswith("|"))
    cells = dict(zip(heading.split(" | "), row.split(" | "), strict=True))
    assert cells["bundle"] == "random" and "32 x 32, float32" in cells["size"]
    # Nothing is known of this CPU's peak.
    assert cells["floor of the step"] == "not known" and "%" not in cells["step (share of peak)"]
    assert f"jax {jax.__version__}" in cells["versions"]
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["parts"].keys() == set(report.PARTS)
    for part in figures["parts"].values():
        assert part["seconds"] > 0 and part["share"] is part["floor_seconds"] is None
    assert figures["parts"]["train"]["flops"] > figures["parts"]["step"]["flops"] > 0
    assert "benchmarks.gpu --parts peer-step" in printed


def test_a_part_without_room_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda: 1000.0)
    with pytest.raises(SystemExit, match="nothing could be measured"):
        bench.main([*FLAGS, "--parts", "step"])
    assert (
        "step: does not fit in memory: the weights of transformer need" in capsys.readouterr().out
    )


def test_an_interrupt_prints_what_was_measured(monkeypatch, capsys) -> None:
    def stop(*_: object) -> Result:
        raise KeyboardInterrupt

    monkeypatch.setitem(run.MEASURES, "step", lambda *_: Result(0.125, 1.0))
    monkeypatch.setitem(run.MEASURES, "section", stop)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        bench.main([*FLAGS, "--parts", "step", "section"])
    row = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("|") and "0.125 s" in line and "not measured" in line for line in row
    )


def test_floor_and_share_are_those_of_the_chip(monkeypatch) -> None:
    monkeypatch.setattr("framepack_jax.bench.result.chip_of", lambda _: chips.CHIPS["h100"])
    devices = jax.local_devices()[:1] * 2
    result = Result(1.0, 0.0, flops=989 * 10**12, moved=10**9)
    assert result.share(devices) == pytest.approx(0.5) == result.floor(devices)
    slow = Result(1.0, 0.0, flops=1, moved=round(3.35232e12))
    assert slow.floor(devices) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "33x32"], "33"),
        (["--bundle", "nothing"], "nothing is not a bundle"),
        (["--json", "/no/such/folder/a.json"], "there is no folder /no/such/folder"),
    ],
)
def test_wrong_flags_are_named(flags, message) -> None:
    with pytest.raises(SystemExit, match=message):
        bench.main([*FLAGS, *flags])
