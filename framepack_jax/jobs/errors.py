"""Errors of a sampling job that the user can act on."""

import jax

from framepack_jax.utils.messages import first_line

# Errors of a disk, a device, or a full memory.
FAILURES = (OSError, MemoryError, jax.errors.JaxRuntimeError)


def explained(error: Exception) -> Exception:
    """Return an error with a one-line message that says what helps."""
    if isinstance(error, ValueError | OSError):
        return error
    line = first_line(error)
    full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line
    if not full and "out of memory" not in line.lower():
        return OSError(line)
    return OSError(
        f"out of memory ({line}); --offload full needs less of the device, --vae-tile 256 less"
        " while decoding; for memory of the host see docs/sampling.md, Little memory"
    )
