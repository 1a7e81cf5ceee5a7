"""Prefetching: order, errors, how far ahead, and the end of the thread."""

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from framepack_jax.utils.prefetch import map_ahead, prefetch


def waits_for(condition: Callable[[], bool]) -> bool:
    ends = time.monotonic() + 10
    while not condition() and time.monotonic() < ends:
        time.sleep(0.01)
    return condition()


def test_items_come_in_order_and_end() -> None:
    items = prefetch(range(100), 3)
    assert list(items) == list(range(100))
    assert list(items) == []


def test_an_error_is_raised_in_its_place() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    items = prefetch(failing(), 4)
    assert next(items) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            next(items)


def test_so_many_items_are_produced_before_they_are_used() -> None:
    produced: list[int] = []
    items = prefetch((produced.append(n) or n for n in itertools.count()), 3)
    assert waits_for(lambda: len(produced) == 3)
    assert [next(items), next(items)] == [0, 1]
    assert waits_for(lambda: len(produced) == 5)
    time.sleep(0.05)
    assert len(produced) == 5
    items.close()


@pytest.mark.parametrize("closed", [True, False])
def test_the_thread_ends_with_the_iterator(closed) -> None:
    before = threading.active_count()
    items = prefetch(itertools.count())
    next(items)
    if closed:
        items.close()
        list(items)  # does not wait for ever
    del items
    gc.collect()
    assert waits_for(lambda: threading.active_count() == before)


def test_a_function_is_mapped_ahead_and_in_order() -> None:
    """Eight items at a time are not yet used."""
    taken = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    results = map_ahead(lambda n: n * n, items(), 8)
    assert next(results) == (0, 0) and len(taken) == 8
    assert list(results) == [(n, n * n) for n in range(1, 20)]


def test_an_error_of_a_mapped_function_is_raised_in_its_place() -> None:
    results = map_ahead(lambda n: 1 / n, (2, 0, 1))
    assert next(results) == (2, 0.5)
    with pytest.raises(ZeroDivisionError):
        next(results)
