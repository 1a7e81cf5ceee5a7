"""Compare what a program needs with the memory of a device, before it is allocated."""

import jax

from framepack_jax.utils.memory import host_memory
from framepack_jax.utils.messages import bytes_text

FULL = "RESOURCE_EXHAUSTED", "Out of memory", "out of memory"


class NoRoom(Exception):
    """A program or its weights need more memory than a device has."""


def device_memory() -> float:
    """Return the bytes that a program can allocate on a device of this machine. Devices of a CPU
    share the memory of the host."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    return stats.get("bytes_limit") or host_memory() / len(devices)


def check_fits(what: str, needed: float) -> None:
    """Raise NoRoom if a device has less memory than `what` needs."""
    if needed > (there := device_memory()):
        raise NoRoom(f"{what} need {bytes_text(needed)} of {bytes_text(there)} a device")


def is_full(error: Exception) -> bool:
    """Return True if an error of the device says that its memory is full."""
    return isinstance(error, NoRoom) or any(text in str(error) for text in FULL)
