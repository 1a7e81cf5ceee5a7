"""Figures of steps, and where they are written."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from framepack_jax.training import metrics
from framepack_jax.training.log_file import LOG, LogFile
from framepack_jax.training.metrics import Jsonl, WandB
from framepack_jax.training.task import Cost, StepMetrics
from tests.fixtures.training_steps import BASE


@pytest.mark.parametrize("every", [1, 3, 4])
def test_rates_do_not_depend_on_how_often_they_are_logged(monkeypatch, every) -> None:
    """Steps of one second, of which a quarter waits for data, beside checkpoints of seven."""
    now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    lines = []
    writer = type("Writer", (), {"write": lambda _, step, figures: lines.append(figures)})
    log = metrics.Log(BASE, lambda step: 0.1, [writer()], metrics.by_group, metrics.COST["all"])
    one = np.float32(0.5)
    log.begin()
    halves, zeros = np.full(4, 0.5), np.zeros(4, int)
    figures = StepMetrics(
        one, one, False, 0, {"losses": halves, "sigmas": halves, "sections": zeros, "clips": zeros}
    )
    for number in range(1, 13):
        now += 0.25
        log.wait(0.25)
        now += 0.75
        log.add(number, figures, Cost(100, 10))
        if number % every == 0:
            log.line()
        if number % 5 == 0:
            with log.paused():
                now += 7
    assert len(lines) == 12 // every
    for line in lines:
        assert (line["seconds_per_step"], line["data_wait_fraction"]) == (1.0, 0.25)
        assert (line["samples_per_second"], line["tokens_per_second"]) == (4.0, 40.0)
        assert line["model_flops_per_second"] == 3 * 4 * 100


def test_what_is_not_finite_is_null_in_the_log(tmp_path) -> None:
    log = metrics.Jsonl(LogFile(tmp_path, 0))
    log.write(1, {"loss": float("nan"), "grad_norm": 1.0})
    log.close()
    (line,) = (tmp_path / LOG).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "grad_norm": 1.0,
    }  # fmt: skip


def test_a_log_cut_in_a_line_is_mended(tmp_path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = Jsonl(LogFile(tmp_path, 2))
    log.write(3, {"loss": 1.0})
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_run_keeps_its_place_on_weights_and_biases(tmp_path, monkeypatch) -> None:
    """With a stand-in that notes how it is called."""
    begun = []
    stand_in = SimpleNamespace(init=lambda **options: begun.append(options))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for folder in (tmp_path / "a" / "mine", tmp_path / "a" / "mine", tmp_path / "b" / "mine"):
        WandB(folder, "project", {"seed": 0})
    first, again, other = begun
    assert first == again
    assert first["name"] == other["name"] == "mine" and first["id"] != other["id"]
    assert first["resume"] == "allow"
