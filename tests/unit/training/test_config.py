"""Refusals of a training configuration, and their messages."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from framepack_jax.cli.config_file import read_config
from framepack_jax.data.config import DataConfig
from framepack_jax.parallel import sharding
from framepack_jax.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from framepack_jax.training.prefetch import check_batch
from framepack_jax.training.vae_config import VaeTrainConfig
from tests.fixtures.paths import ROOT
from tests.fixtures.training_steps import changed


@pytest.mark.parametrize("named, fields", [
    ("--remat some: expected one of none, dots, attention, full, offload", {"remat": "some"}),
    ("--trainable LoRA: expected one of all, context, lora", {"trainable": "LoRA"}),
    ("--optimizer.name adam: expected one of adamw", {"optimizer": OptimizerConfig(name="adam")}),
    ("--data.sections rand: expected one of", {"data": DataConfig(sections="rand")}),
    ("--seed -1", {"seed": -1}),
    ("--validation.sigmas ()", {"validation": ValidationConfig(sigmas=())}),
])  # fmt: skip
def test_what_a_configuration_cannot_say_is_named(named, fields) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        changed(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "--batch 0"),
        ({"grad_accum_steps": 3}, "--grad-accum-steps 3 does not divide --batch 4"),
        ({"ema": 1.0}, "--ema 1.0"),
        (
            {"data": DataConfig(empty_start=0.1), "trainable": "lora"},
            "--data.empty-start 0.1 with --trainable lora",
        ),
        ({"causal": True, "trainable": "lora"}, "--causal with --trainable lora"),
        ({"reduce_dtype": "bfloat16"}, "--reduce-dtype bfloat16 with --dtype float32"),
        ({"optimizer": OptimizerConfig(learning_rate=float("nan"))}, "learning-rate nan"),
        ({"init": "bundle"}, "--init bundle takes a network as it is"),
        ({"init": "scratch", "trainable": "lora"}, "lora would leave random ones frozen"),
        ({"validation": ValidationConfig(every=-1)}, "--validation.every -1"),
        ({"validation": ValidationConfig(samples=0)}, "--validation.samples 0"),
        ({"validation": ValidationConfig(videos=-2)}, "--validation.videos -2"),
        ({"checkpoints": CheckpointConfig(keep_every=-1)}, "--checkpoints.keep-every -1"),
    ],
)
def test_impossible_configurations_are_named(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**fields)


def test_the_documented_commands_divide_their_batches() -> None:
    """Commands of docs and configurations, on as many devices as they say."""
    told = []
    for text in (ROOT / "docs" / "many-devices.md", *(ROOT / "configs").glob("*.py")):
        lines = re.sub(r"\s*\\?\n\s+", " ", text.read_text()).splitlines()
        told += [line for line in lines if "train.py --config" in line and "--mesh" in line]
    assert len(told) >= 4
    for line in told:
        (file,) = re.findall(r"--config (\S+)", line)
        (mesh,) = re.findall(r"--mesh ([\w=,]+)", line)
        given = re.findall(r"--batch (\d+)", line)
        cfg = read_config(ROOT / file, TrainConfig)
        batch = int(given[0]) if given else cfg.batch
        sizes = sharding.parse_mesh(mesh)
        shape = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
        check_batch(batch, cfg.grad_accum_steps, SimpleNamespace(shape=shape))


def test_configs_are_what_they_say() -> None:
    """Every configuration in configs/ that trains is valid, and its docstring has a command."""
    found = 0
    for file in sorted((ROOT / "configs").glob("*.py")):
        text = file.read_text()
        if "training.config" not in text or "AblationConfig" in text:
            continue
        config = read_config(file, VaeTrainConfig if "training.vae" in text else TrainConfig)
        assert f"configs/{file.name}" in file.read_text()
        assert dataclasses.asdict(config)["steps"] > 0
        found += 1
    assert found == 13
