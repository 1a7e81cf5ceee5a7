"""Settings of the C library's allocator, and pages of mapped files."""

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

# Of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Let the C library reuse large freed buffers, in all threads.

    New pages from the system cost more time than the conversion of their numbers.
    """
    try:
        allocator = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library than glibc
    allocator(M_MMAP_MAX, 0)
    allocator(M_ARENA_MAX, 1)
    allocator(M_TRIM_THRESHOLD, (1 << 31) - 1)


def release_pages(files: Iterable[Path]) -> None:
    """Give back the pages of mapped files that were read.

    Else they count as memory of this process until the files are closed. A later read fetches them
    from the file again. Does nothing if the system does not list mapped regions.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    names = {str(file.resolve()) for file in files}
    advise = ctypes.CDLL(None).madvise
    for line in maps.read_text().splitlines():
        region, *_, name = line.split(maxsplit=5)
        if name in names:
            begin, end = (int(address, 16) for address in region.split("-"))
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
