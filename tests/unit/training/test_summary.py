"""Lines that a run prints before its first step."""

import collections

from framepack_jax.training import summary
from framepack_jax.training.config import LoRAConfig
from tests.fixtures.training_steps import changed


def test_alpha_far_from_the_rank_is_warned_of() -> None:
    for alpha in (1.0, 4.0, 16.0):
        lora = LoRAConfig(rank=4, alpha=alpha)
        assert summary.lora_warning(changed(trainable="lora", lora=lora)) is None
    warned = summary.lora_warning(changed(trainable="lora", lora=LoRAConfig(rank=4)))
    assert "--lora.rank 4 with --lora.alpha 32" in warned
    assert "by 8; --lora.alpha 4 makes it 1" in warned
    assert summary.lora_warning(changed(lora=LoRAConfig(rank=4))) is None


def test_a_batch_is_said_to_lie_on_devices() -> None:
    mesh = collections.namedtuple("Mesh", "shape size")
    said = [summary.batch_line(8, parts, mesh({"data": 1, "fsdp": 4}, size))
            for parts, size in ((1, 4), (2, 8))]  # fmt: skip
    assert said == [
        "batch        8 samples in all, 2 on each of 4 devices",
        "batch        8 samples in all, 2 on each of 4 groups of 2 devices, in 2 parts",
    ]


def test_the_first_checkpoint_and_validation_are_announced() -> None:
    """Of a run that resumes after a step; they come after the last step at the latest."""
    assert summary.steps_line(0, 1000, 500, 300, "--data.holdout 0") == (
        "steps        1 to 1,000; the first checkpoint comes after step 500, validation after step"
        " 300"
    )
    assert summary.steps_line(500, 700, 500, 0, "--data.holdout 0") == (
        "steps        501 to 700; the first checkpoint comes after step 700, no validation"
        " (--data.holdout 0)"
    )
