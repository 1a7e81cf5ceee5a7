"""The turns of datasets."""

import collections
import random

import pytest

from framepack_jax.data.bucket_schedule import BucketSchedule, turn_of, whole_weights


def test_weights_become_the_smallest_whole_numbers() -> None:
    assert whole_weights([0.7, 0.3]) == whole_weights([70, 30.0]) == (7, 3)
    assert whole_weights([1e-05, 1]) == (1, 100000)
    assert whole_weights([4]) == (1,)


@pytest.mark.parametrize("seed", range(6))
def test_turns_are_within_one_batch_of_the_weights(seed) -> None:
    """After any number of steps; with two datasets, in any window."""
    draw = random.Random(seed)
    weights = tuple(draw.choice([1, 2, 7, 333, 5000]) for _ in range(2 + seed))
    taken, last = [0] * len(weights), [[0.0] for _ in weights]
    for step in range(1500):
        dataset, number = turn_of(weights, step)
        assert number == taken[dataset]
        taken[dataset] += 1
        for i, weight in enumerate(weights):
            last[i].append(taken[i] - (step + 1) * weight / sum(weights))
    bound = 1 - 1 / (2 * len(weights) - 2) + 1e-9
    assert max(abs(x) for each in last for x in each) <= bound
    if len(weights) == 2:
        assert all(max(each) - min(each) <= 1 + 1e-9 for each in last)


def test_a_turn_does_not_depend_on_the_steps_looked_at_before() -> None:
    late = turn_of((5, 3, 1), 5000)
    sequence = [turn_of((5, 3, 1), step) for step in range(5001)]
    assert sequence[-1] == late


def test_every_dataset_has_cycles_of_its_own() -> None:
    """Its buckets in proportion to its clips, in an order of its own; the first as if alone."""
    counts = [[3, 1], [3, 1], [2]]
    schedule = BucketSchedule(counts, (2, 2, 1), 4, 7)
    found = [schedule.of_step(step) for step in range(200)]
    by_dataset = collections.defaultdict(list)
    for stream, number in found:
        by_dataset[stream // 2].append((stream % 2, number))
    assert [len(by_dataset[i]) for i in range(3)] == [80, 80, 40]
    alone = BucketSchedule(counts[:1], (1,), 4, 7)
    assert by_dataset[0] == [alone.of_step(step) for step in range(80)]
    assert by_dataset[1] != by_dataset[0]
    for dataset, sizes in enumerate(counts):
        turns, cycle = by_dataset[dataset], sum(sizes)
        for first in range(0, len(turns), cycle):
            buckets = collections.Counter(bucket for bucket, _ in turns[first : first + cycle])
            assert buckets == dict(enumerate(sizes))
        for bucket in range(len(sizes)):
            numbers = [number for stream, number in turns if stream == bucket]
            assert numbers == list(range(len(numbers)))
    assert [schedule[4 * 9 + place] for place in range(4)] == [
        (found[9][0], 4 * found[9][1] + place) for place in range(4)
    ]
