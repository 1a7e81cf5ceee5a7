"""The ablation as typed: methods are trained, evaluated and compared, and none is made twice."""

import json
import re
from pathlib import Path

import pytest

from framepack_jax.__main__ import main as framepack
from framepack_jax.cli import training
from framepack_jax.toy import baselines, suites
from framepack_jax.training import checkpoints
from tests.fixtures.training_data import write_dataset

CONFIG = """
from framepack_jax.cli.ablation import AblationConfig
from framepack_jax.cli.evaluate import Suites
from framepack_jax.data.config import DataConfig
from framepack_jax.toy.methods import Method
from framepack_jax.training.config import CheckpointConfig, TrainConfig, ValidationConfig

F1 = "f1k1_x_f16k4f2k2f1k1_g2"
METHODS = (
    Method("plain", F1),
    Method("noisy, discretized", f"{F1}+D8", {"history.noisy": "random"}),
    Method("two steps", F1, sample={"steps": 2}),
)

def get_config():
    return AblationConfig(
        methods=METHODS,
        train=TrainConfig(
            bundle="random", init="scratch",
            network={"double_layers": 1, "single_layers": 1, "refiner_layers": 1},
            data=DataConfig(path=DATASET), batch=2, steps=2, dtype="float32", remat="none",
            validation=ValidationConfig(every=0), checkpoints=CheckpointConfig(every=1),
            tensorboard=False,
        ),
        evaluate=Suites(
            videos=2, seconds=(0.3,), occlusion_videos=0, prompt_pairs=0, size="32x48", steps=1,
            batch=2,
        ),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    write_dataset(folder / "dataset", {(32, 48): (7, 5, 5, 7)})
    text = CONFIG.replace("DATASET", repr(str(folder / "dataset")))
    (folder / "config.py").write_text(text)
    return folder


def ablation(place: Path, *more: str) -> None:
    config = ("--config", str(place / "config.py"), "--output", str(place / "out"))
    framepack(["ablation", *config, *more])


def test_it_is_stopped_and_goes_on_to_one_table(place, monkeypatch) -> None:
    out, trained, reported = place / "out", [], []
    train = training.train

    def stop_at_the_second(cfg, *args, **options) -> None:
        trained.append(Path(cfg.output).name)
        reported.append((out / "report.json").exists())
        if len(trained) == 2:
            raise KeyboardInterrupt
        train(cfg, *args, **options)

    monkeypatch.setattr(baselines, "CLIP_LATENTS", 2)
    monkeypatch.setattr(training, "train", stop_at_the_second)
    two = ("--only", "plain", "noisy, discretized")
    with pytest.raises(SystemExit) as ended:
        ablation(place, *two)
    assert ended.value.code == 130 and trained == ["plain", "noisy_discretized"]
    first = json.loads((out / "report.json").read_text())
    assert list(first["methods"]) == ["plain"] and (out / "codebooks" / "8.safetensors").exists()

    # As if the first method had been trained, and its evaluation stopped: that comes first. The
    # third method samples the weights of the first one.
    (out / "report.json").unlink()
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*.npz")}
    ablation(place)
    assert trained[2:] == ["noisy_discretized"] and reported == [False, True, True]
    assert all(file.stat().st_mtime_ns == time for file, time in files.items())
    found = json.loads((out / "report.json").read_text())
    names = ["plain", "noisy, discretized", "two steps"]
    assert list(found["methods"]) == list(found["costs"]["rows"]) == names
    summary = found["summary"]["rows"]
    assert list(summary) == [*suites.REFERENCES, *names]
    assert summary["plain"] == first["summary"]["rows"]["plain"] != summary["two steps"]
    assert all(summary[name]["drift_sharpness"]["error"] > 0 for name in names)

    costs = {
        row: {name: cell and cell["mean"] for name, cell in cells.items()}
        for row, cells in found["costs"]["rows"].items()
    }
    # 16 frames under k4, 2 under k2 and 2 under k1, of 4 x 6 latents.
    assert costs["plain"]["context"] == 4 * 1 + 1 * 2 + 2 * 6 and costs["plain"]["target"] == 2 * 6
    assert costs["two steps"]["flops"] == pytest.approx(2 * costs["plain"]["flops"])
    assert all(costs[name]["training"] > 0 and costs[name]["sampling"] > 0 for name in names)
    config = checkpoints.read_record(out / "runs" / "noisy_discretized")["config"]
    assert config["history"]["noisy"] == "random" and config["schedule"].endswith("+D8")
    text = (out / "report.md").read_text()
    assert "| two steps | `f1k1_x_f16k4f2k2f1k1_g2` | 2 |  | steps 2 |" in text
    links = re.findall(r"\]\((.+?)\)", text)
    assert len(links) == len(summary) + 2 and all((out / link).exists() for link in links)
    ablation(place)
    assert len(trained) == 3
    with pytest.raises(SystemExit, match=r"plain was started with .*\(seed = 0 then, 1 now\)"):
        ablation(place, "--train.seed", "1")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--only", "plan"), "--only 'plan': expected one of 'plain', 'noisy"),
        (("--evaluate.videos", "0"), "there is nothing to do"),
        (("--train.bundle", "nowhere"), "nowhere is not a bundle"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(place, tmp_path, more, words, capsys):
    with pytest.raises(SystemExit):
        ablation(place, *more, "--output", str(tmp_path / "out"))
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()
