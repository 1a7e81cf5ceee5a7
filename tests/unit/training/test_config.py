"""What a training configuration refuses, and what it says."""

import re

import pytest

from framepack_jax.data.config import DataConfig
from framepack_jax.training.config import CheckpointConfig, OptimizerConfig, ValidationConfig
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
        ({"output": "gs://bucket/run"}, "--output gs://bucket/run: expected a folder on a disk"),
        ({"grad_accum_steps": 3}, "--grad-accum-steps 3 does not divide --batch 4"),
        ({"ema": 1.0}, "--ema 1.0"),
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
