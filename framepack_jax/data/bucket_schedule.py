"""The order in which batches take their samples from the streams of the buckets."""

import functools
from collections.abc import Sequence

import grain
import numpy as np


class BucketSchedule(grain.transforms.DatasetSelectionMap):
    """Map an element of the stream to (bucket, element of the stream of that bucket).

    All samples of a batch share one bucket. A cycle has as many batches as there are clips: from
    each bucket as many as it has clips, shuffled anew in each cycle.
    """

    def __init__(self, counts: Sequence[int], batch: int, seed: int) -> None:
        self.counts, self.batch, self.seed = tuple(counts), batch, seed

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, element: int) -> tuple[int, int]:
        step, place = divmod(int(element), self.batch)
        bucket, number = self.of_step(step)
        return bucket, number * self.batch + place

    def of_step(self, step: int) -> tuple[int, int]:
        """Return (bucket, number of the batch among those of its bucket) for a step."""
        cycle, place = divmod(step, sum(self.counts))
        buckets, numbers = _cycle(self.counts, self.seed, cycle)
        bucket = int(buckets[place])
        return bucket, cycle * self.counts[bucket] + int(numbers[place])


@functools.lru_cache(maxsize=4)
def _cycle(counts: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bucket of each batch of a cycle, and its number among those of its bucket."""
    buckets = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng([seed, cycle]).shuffle(buckets)
    numbers = np.empty(len(buckets), np.int64)
    for bucket, count in enumerate(counts):
        numbers[buckets == bucket] = np.arange(count)
    return buckets, numbers
