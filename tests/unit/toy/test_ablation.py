"""Methods of an ablation: their settings of training, and which of them share a run."""

from pathlib import Path

import pytest

from framepack_jax.cli.ablation import AblationConfig, main
from framepack_jax.cli.config_file import read_config
from framepack_jax.data.config import DataConfig
from framepack_jax.toy import ablation
from framepack_jax.toy.methods import Method
from framepack_jax.training.config import TrainConfig
from tests.fixtures.paths import ROOT

F1 = "f1k1_x_f16k4f2k2f1k1_g9"
COMMON = TrainConfig(bundle="random", data=DataConfig(path="dataset"))


def test_methods_change_the_common_settings_by_the_names_of_flags() -> None:
    changes = {"history.noisy": "random", "data.caption-dropout": 0.5, "steps": 7}
    run = ablation.training_of(Method("some, noise", F1, changes), COMMON, Path("out"))
    assert (run.history.noisy, run.data.caption_dropout, run.steps) == ("random", 0.5, 7)
    assert (run.schedule, run.output, run.codebook) == (F1, "out/runs/some_noise", None)
    assert run.data.path == "dataset" and run.optimizer == COMMON.optimizer


def test_equal_training_is_shared() -> None:
    methods = [
        Method("one", F1), Method("other weights", F1, {"seed": 1}),
        Method("guided", F1, sample={"cfg_scale": 2}), Method("discrete", f"{F1}+D16"),
    ]  # fmt: skip
    runs = ablation.runs_of(methods, COMMON, Path("out"))
    assert [Path(run.output).name for run in runs] == ["one", "other_weights", "one", "discrete"]
    assert runs[3].codebook == "out/codebooks/16.safetensors"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Method("a", F1, {"history.noise": 1}), "'a': train: unknown setting 'noise'; known are"),
        (Method("a", F1, {"stepz": 1}), "method 'a': train: unknown setting 'stepz'"),
        (Method("a", F1, {"steps.all": 1}), "unknown setting 'steps.all'"),
        (Method("a", F1, {"history.noisy": "much"}), "method 'a': .*noisy"),
        (Method("a", "g9_q"), "method 'a': schedule 'g9_q'"),
    ],
)
def test_impossible_methods_are_named(method: Method, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ablation.runs_of([method], COMMON, Path("out"))


def test_a_schedule_must_fit_the_network() -> None:
    method = Method("far", "td_f2k8f1k1_g9")
    run = ablation.training_of(method, COMMON, Path("out"))
    with pytest.raises(ValueError, match="'far': the schedule uses patch kernel k8"):
        ablation.check(method, run)


def test_the_methods_of_the_paper_fit_the_tiny_bundle() -> None:
    cfg = read_config(ROOT / "configs" / "ablation.py", AblationConfig)
    runs = ablation.runs_of(cfg.methods, cfg.train, Path("out"))
    for method, run in zip(cfg.methods, runs, strict=True):
        ablation.check(method, run)
    assert len({run.output for run in runs}) == len(runs) - 2  # three levels of noisy history


def test_other_videos_are_not_trained_on(tmp_path, capsys) -> None:
    """The settings of the videos are noted before the first one is drawn."""
    made_with = {"clips": 16, "seconds": 5.0, "size": "64x64", "bundle": "tiny"}
    ablation.note_world(tmp_path, made_with)
    ablation.note_world(tmp_path, made_with)
    config = str(ROOT / "configs" / "ablation.py")
    with pytest.raises(SystemExit):
        main(["--config", config, "--output", str(tmp_path), "--only", "vanilla", "--clips", "17"])
    assert "(clips = 16 then, 17 now)" in capsys.readouterr().err
    assert not (tmp_path / "videos").exists()
