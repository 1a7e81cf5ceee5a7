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


def test_memory_of_the_largest_program_is_beside_that_of_the_device(monkeypatch) -> None:
    """A donated state is counted once."""
    Memory = collections.namedtuple(
        "Memory", "argument_size_in_bytes output_size_in_bytes alias_size_in_bytes"
        " temp_size_in_bytes",
    )  # fmt: skip

    class Program:
        def __init__(self, temporary: int | None) -> None:
            self.temporary = temporary

        def memory_analysis(self) -> Memory | None:
            return self.temporary and Memory(2 * GB, GB, GB - 1000, self.temporary)

    GB = 10**9
    programs = {((n,),): (Program(size), None) for n, size in enumerate((4 * GB, 10 * GB, None))}
    monkeypatch.setattr(summary, "limit_of_device", lambda: 84 * GB)
    assert summary.step_memory_line(programs) == (
        "memory       12.0 GB of 84.0 GB on each device in a step: state, weights and batch 2.00"
        " GB, temporary 10.0 GB"
    )
    assert summary.step_memory_line({((2,),): (Program(None), None)}) is None


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
