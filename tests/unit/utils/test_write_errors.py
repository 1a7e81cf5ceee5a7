"""Errors of writing name the path, the host, the cause and what to do."""

import os
import socket

import pytest

from framepack_jax.utils.write_errors import WriteError, explain_write_error, write_errors

# As TensorStore words them, on a disk and in a bucket.
FULL = (
    'RESOURCE_EXHAUSTED: Error writing "data/d/0a": Failed to write to file: "/run/0a.__lock"'
    " [OS error 28: ENOSPC No space left on device]"
)
DENIED = (
    'PERMISSION_DENIED: Error writing "gs://bucket/run/d/0a": HTTP response code: 403 with body'
    f' "{"x" * 900}"'
)


@pytest.mark.parametrize(
    ("error", "cause", "remedy"),
    [
        (ValueError(FULL), "no space left (RESOURCE_EXHAUSTED: Error", "; free space"),
        (ValueError(DENIED), "permission denied (PERMISSION_DENIED: Error", "; let the account"),
        (OSError(27, os.strerror(27)), "no space left ([Errno 27]", "; free space"),
        (PermissionError(13, "no", "a"), "permission denied ([Errno 13] no: 'a')", "; let the"),
        (OSError(30, os.strerror(30)), "permission denied ([Errno 30]", "; let the account"),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error", "; fix the cause"),
    ],
)
def test_the_cause_and_what_to_do_are_named(error, cause, remedy) -> None:
    said = explain_write_error(error, "process 3 on tpu-7")
    assert said.startswith(f"by process 3 on tpu-7: {cause}") and remedy in said
    assert len(said) < 450


def test_a_full_disk_is_named_with_the_path_and_the_host() -> None:
    with (
        pytest.raises(WriteError) as raised,
        write_errors("/dev/full"),
        open("/dev/full", "w") as file,
    ):
        file.write("text")
    assert str(raised.value) == (
        f"/dev/full could not be written by {socket.gethostname()}: no space left ([Errno 28] No"
        " space left on device); free space, then run the same command again"
    )


def test_the_innermost_path_is_named() -> None:
    with pytest.raises(WriteError, match=r"^b could not"), write_errors("a"), write_errors("b"):
        raise OSError("away")
