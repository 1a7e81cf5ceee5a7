"""Errors of writing to a disk or an object store: the path, the host, the cause, and what to do."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

from etils import epath

from framepack_jax.utils.messages import first_line

# What to say and to do for the numbers of errors of the system, and for words in errors of
# TensorStore and of clients of object stores.
CAUSES = (
    (
        "no space left",
        "free space",
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        ("No space left", "ENOSPC", "quota exceeded", "File too large"),
    ),
    (
        "permission denied",
        "let the account of this host write there",
        (errno.EACCES, errno.EPERM, errno.EROFS),
        ("PERMISSION_DENIED", "ermission denied", "code: 403", "orbidden", "Read-only"),
    ),
)
MAX_LENGTH = 300


class WriteError(OSError):
    """A file could not be written; the text says all."""


def explain_write_error(error: BaseException, host: str) -> str:
    """Return "by HOST: CAUSE (what the system says); what to do"."""
    said = first_line(error)
    if len(said) > MAX_LENGTH:
        # What went wrong is at the begin, its reason at the end.
        said = f"{said[: MAX_LENGTH // 2]} ... {said[-MAX_LENGTH // 2 :]}"
    for cause, remedy, numbers, words in CAUSES:
        if getattr(error, "errno", None) in numbers or any(word in str(error) for word in words):
            return f"by {host}: {cause} ({said}); {remedy}"
    return f"by {host}: {said}; fix the cause"


@contextlib.contextmanager
def write_errors(path: epath.PathLike) -> Iterator[None]:
    """Raise WriteError for each OSError of writing to a path."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        text = explain_write_error(error, socket.gethostname())
        raise WriteError(
            f"{os.fspath(path)} could not be written {text}, then run the same command again"
        ) from error
