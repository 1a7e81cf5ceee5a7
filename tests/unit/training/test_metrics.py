"""Figures of steps, and where they are written."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from framepack_jax.training import metrics
from framepack_jax.training.log_file import LOG, LogFile
from framepack_jax.training.metrics import Jsonl, WandB
from framepack_jax.training.task import Cost, StepMetrics
from framepack_jax.video import save_png
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


def test_validation_videos_are_shown_by_every_writer(tmp_path, monkeypatch) -> None:
    """TensorBoard's event file has the contact sheet; Weights & Biases also gets the video."""
    cfg = dataclasses.replace(BASE, output=str(tmp_path))
    sheet = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    folder = Path(metrics.validation_folder(tmp_path, 7))
    folder.mkdir(parents=True)
    save_png(folder / "0.png", sheet)
    (folder / "0.mp4").write_bytes(b"video")
    logged = []
    run = SimpleNamespace(log=lambda shown, step: logged.append((step, shown)))
    stand_in = SimpleNamespace(
        init=lambda **_: run, Image=lambda pixels: ("image", pixels.shape),
        Video=lambda file, format: ("video", file, format),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    board = metrics.TensorBoard(tmp_path, 0)
    log = metrics.Log(cfg, lambda _: 0.0, [board, WandB(tmp_path, "project", {})], lambda _: {})
    log.show(6)
    log.show(7)
    board.close()
    shown = {
        "validation/0_sheet": ("image", (8, 12, 3)),
        "validation/0": ("video", str(folder / "0.mp4"), "mp4"),
    }
    assert logged == [(7, shown)]
    (value,) = (v for event in events(tmp_path) for v in event.summary.value)
    assert value.tag.startswith("validation/0")
    with Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
        np.testing.assert_array_equal(np.asarray(image), sheet)


def events(folder: Path) -> list[Event]:
    """Read an event file: records of a length, its checksum, an event, and its checksum."""
    (file,) = (folder / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[12 + length + 4 :]
    return found
