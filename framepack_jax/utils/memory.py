"""Memory of the host."""

import os
from pathlib import Path

LIMIT = Path("/sys/fs/cgroup/memory.max")


def host_memory() -> int:
    """Return the bytes of host memory, within the limit of the control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if LIMIT.exists() and (text := LIMIT.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total
