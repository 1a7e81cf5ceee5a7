"""The order in which batches take their samples from the streams of datasets and buckets."""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np


class BucketSchedule(grain.transforms.DatasetSelectionMap):
    """Map an element to (stream, element of that stream).

    Each bucket of each dataset has a stream, numbered in this order. All samples of a batch share
    one stream. Datasets take turns by their weights. A cycle of a dataset has as many batches as
    there are clips: from each bucket as many as it has clips, shuffled anew in each cycle.

    Args:
        counts: clips of each bucket of each dataset.
        weights: whole numbers in the ratio of the batches of the datasets.
    """

    def __init__(
        self, counts: Sequence[Sequence[int]], weights: Sequence[int], batch: int, seed: int
    ) -> None:
        self.counts, self.weights = tuple(map(tuple, counts)), tuple(weights)
        self.batch, self.seed = batch, seed

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, element: int) -> tuple[int, int]:
        step, place = divmod(int(element), self.batch)
        stream, number = self.of_step(step)
        return stream, number * self.batch + place

    def of_step(self, step: int) -> tuple[int, int]:
        """Return (stream, number of the batch among those of its stream) for a step."""
        dataset, turn = turn_of(self.weights, step)
        counts = self.counts[dataset]
        cycle, place = divmod(turn, sum(counts))
        buckets, numbers = _cycle(counts, self.seed, dataset, cycle)
        bucket = int(buckets[place])
        first = sum(map(len, self.counts[:dataset]))
        return first + bucket, cycle * counts[bucket] + int(numbers[place])


@functools.lru_cache(maxsize=16)
def _cycle(
    counts: tuple[int, ...], seed: int, dataset: int, cycle: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bucket of each batch of a cycle, and its number among those of its bucket."""
    buckets = np.repeat(np.arange(len(counts)), counts)
    rng = np.random.default_rng([seed, cycle, dataset] if dataset else [seed, cycle])
    rng.shuffle(buckets)
    numbers = np.empty(len(buckets), np.int64)
    for bucket, count in enumerate(counts):
        numbers[buckets == bucket] = np.arange(count)
    return buckets, numbers


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest whole numbers in the ratio of weights: 0.7 and 0.3 give 7 and 3."""
    fractions = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * common) for fraction in fractions]
    return tuple(number // math.gcd(*whole) for number in whole)


def turn_of(weights: tuple[int, ...], step: int) -> tuple[int, int]:
    """Return (dataset, number of the batch among those of the dataset) for a step.

    After any number of steps, each dataset has less than one batch more or fewer than its share.
    """
    if len(weights) == 1:
        return 0, step
    # Powers of two, so that few lengths are computed.
    datasets, numbers = _turns(weights, 1 << max(10, step.bit_length()))
    return int(datasets[step]), int(numbers[step])


@functools.lru_cache(maxsize=2)
def _turns(weights: tuple[int, ...], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the dataset of each step, and its number among the steps of that dataset.

    The algorithm of R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980):
    of those who may have the next turn, the one who must have a turn first. For k datasets it keeps
    the difference to the share within 1 - 1 / (2k - 2), the smallest possible bound.
    """
    total, part = sum(weights), 2 * len(weights) - 2
    taken = [0] * len(weights)
    datasets, numbers = np.empty(steps, np.int32), np.empty(steps, np.int64)
    for step in range(steps):
        first = math.inf
        for dataset, weight in enumerate(weights):
            # How far the dataset is behind its share after this step, in parts of a batch.
            behind = part * (weight * (step + 1) - total * taken[dataset])
            # Steps until it would be too far behind.
            until = ((part - 1) * total - behind) / weight
            if behind >= total and until < first:
                chosen, first = dataset, until
        datasets[step], numbers[step] = chosen, taken[chosen]
        taken[chosen] += 1
    return datasets, numbers
