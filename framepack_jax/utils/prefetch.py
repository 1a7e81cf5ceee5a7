"""Work done in a thread ahead of its use."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# Items that are made while others are used.
AHEAD = 4
Item = TypeVar("Item")


def prefetch(items: Iterable[Item], count: int = AHEAD) -> Iterator[Item]:
    """The same items, made in a thread of its own while those before are dealt with, at most
    `count` of them at a time."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as maker:
        coming = deque(maker.submit(next, iterator, end) for _ in range(count))
        while (item := coming.popleft().result()) is not end:
            coming.append(maker.submit(next, iterator, end))
            yield item
