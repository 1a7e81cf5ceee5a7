"""Errors of a sampling job: one line that says what helps."""

import jax
import pytest

from framepack_jax.jobs.errors import explained


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 GB"),
        jax.errors.JaxRuntimeError("INTERNAL: Out of memory allocating 17 GB"),
    ],
)
def test_a_full_memory_is_answered_with_what_needs_less(error: Exception) -> None:
    assert "--offload full needs less of the device" in str(explained(error))


def test_other_errors_stay_one_line() -> None:
    error = jax.errors.JaxRuntimeError("INTERNAL: the driver is gone\nat 0x17\nat 0x18")
    assert str(explained(error)) == "INTERNAL: the driver is gone"
    for known in (ValueError("a flag"), OSError("a disk")):
        assert explained(known) is known
