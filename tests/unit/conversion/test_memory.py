"""Memory of mapped files."""

import mmap
import re
from pathlib import Path

import pytest

from framepack_jax.conversion.memory import release_pages

SMAPS = Path("/proc/self/smaps")


def resident(file: Path) -> int:
    """Bytes of a mapped file that count as memory of this process."""
    regions = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text())
    mapped = [region for region in regions if region.partition("\n")[0].endswith(str(file))]
    return sum(1024 * int(re.search(r"Rss: +(\d+) kB", region)[1]) for region in mapped)


@pytest.mark.skipif(not SMAPS.exists(), reason="the system does not list mapped regions")
def test_pages_of_files_that_were_read_are_given_back(tmp_path) -> None:
    size = 1 << 20
    read, kept = tmp_path / "read", tmp_path / "kept"
    maps = []
    for file in (read, kept):
        file.write_bytes(bytes(range(256)) * (size // 256))
        with file.open("rb") as opened:
            maps.append(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    assert sum(maps[0][:]) == sum(maps[1][:]) and resident(read) == resident(kept) == size
    release_pages([read])
    assert resident(read) == 0 and resident(kept) == size
    assert maps[0][:] == maps[1][:]
