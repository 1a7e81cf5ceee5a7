"""Configurations by name and by path."""

import re
from pathlib import Path

import pytest

from framepack_jax.cli import config_file, train
from framepack_jax.cli.config_file import find
from framepack_jax.training.config import TrainConfig
from tests.fixtures.paths import ROOT


def test_a_name_is_a_file_of_configs(tmp_path, monkeypatch) -> None:
    """In any working folder."""
    monkeypatch.chdir(tmp_path)
    assert config_file.names() == sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
    assert find("lora_i2v") == ROOT / "configs" / "lora_i2v.py"
    flags = config_file.defaults(train.Train, TrainConfig, ["--config", "lora_i2v", "--steps", "2"])
    assert (flags.trainable, flags.lora.rank) == ("lora", 32)


@pytest.mark.parametrize("text", ["mine.py", "configs/mine", "./mine", "../mine.py", "/a/mine"])
def test_a_path_stays_one(text: str) -> None:
    assert find(text) == Path(text)


def test_configs_of_a_wheel_are_inside_of_the_package(tmp_path, monkeypatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "other.py").touch()
    monkeypatch.setattr(config_file, "PACKAGE", tmp_path)
    assert config_file.names() == ["other"] and find("other").is_relative_to(tmp_path)


@pytest.mark.parametrize("text", ["lora_i2w", "tiny/", "mine.py"])
def test_names_are_listed_for_an_unknown_one(text: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = r".*ablation, .*lora_i2v, .*tiny_wan"
    with pytest.raises(ValueError, match=re.escape(f"--config {text.rstrip('/')}") + listed):
        config_file.defaults(train.Train, TrainConfig, ["--config", text])
