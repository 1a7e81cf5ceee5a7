"""Find the host that keeps the others waiting.

All hosts take a step in the same time, for each waits for all. The slowest is the one that waits
least: its own work, with reading data, takes the most time.
"""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils


class HostTimes:
    """Seconds of this host's own work and of its wait for data, since the last line of the log."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin anew."""
        self.began, self.blocked, self.waited = time.monotonic(), 0.0, 0.0

    def figures(self, steps: int) -> dict[str, float]:
        """Return seconds a step of all hosts, largest and median, and the index of the slowest; and
        begin anew. All hosts call this together. Returns nothing for a single host."""
        busy = time.monotonic() - self.began - self.blocked
        mine = np.array([busy, self.waited], np.float32) / max(steps, 1)
        several = jax.process_count() > 1
        found = summarize(multihost_utils.process_allgather(mine)) if several else {}
        # This waits for the slowest host, too.
        self.begin()
        return found


def summarize(hosts: np.ndarray) -> dict[str, float]:
    """Summarise (hosts, 2): seconds a step of own work, and of these the wait for data."""
    busy, waited = hosts.T
    return {
        "hosts/busy_seconds_max": float(busy.max()),
        "hosts/busy_seconds_median": float(np.median(busy)),
        "hosts/data_wait_seconds_max": float(waited.max()),
        "hosts/slowest": float(busy.argmax()),
    }
