"""An endless stream of batches with a position that any number of hosts can resume.

Grain's `ElasticIterator` has the same positions, but reads ahead whole batches, each in one thread.
Here threads read samples, so that the memory of read-ahead does not grow with the batch.
"""

from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

# The name that Grain gives the position in checkpoints.
POSITION = "global_next_index"


class BatchStream(Iterator[Any]):
    """Share (index, count) of batches of `batch` consecutive samples of an endless dataset.

    `ahead` samples of this host are read in `threads`, or in `workers` processes if not 0.
    """

    def __init__(
        self,
        samples: grain.MapDataset[Any],
        batch: int,
        share: tuple[int, int],
        *,
        threads: int,
        ahead: int,
        workers: int = 0,
    ) -> None:
        self.samples, self.batch, self.share = samples, batch, share
        self.options = grain.ReadOptions(threads, ahead)
        self.workers = None
        if workers:
            # Grain reads its own flags, which only an absl app parses.
            flags.FLAGS.mark_as_parsed()
            each = max(1, ahead // workers)
            self.workers = grain.MultiprocessingOptions(workers, per_worker_buffer_size=each)
        self.next = 0
        self._batches: Any = None

    def __next__(self) -> Any:
        """Return the share of the next batch."""
        if self._batches is None:
            self._batches = self._open()
        found = next(self._batches)
        self.next += self.batch
        return found

    def _open(self) -> Any:
        index, count = self.share
        mine = self.samples[self.next + index :: count].to_iter_dataset(self.options)
        if self.workers is not None:
            mine = mine.mp_prefetch(self.workers)
        return iter(mine.batch(self.batch // count, drop_remainder=True))

    def get_state(self) -> dict[str, Any]:
        """Return the position, the same on every host."""
        return {POSITION: self.next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Move to a position."""
        self.close()
        self.next = state[POSITION]

    def close(self) -> None:
        """End the threads or processes that read ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
