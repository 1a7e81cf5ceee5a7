"""Compute items in a thread ahead of their use."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# Items that are computed ahead.
AHEAD = 4
Item = TypeVar("Item")


def prefetch(items: Iterable[Item], count: int = AHEAD) -> Iterator[Item]:
    """Yield the items in order; a thread computes up to `count` of them ahead."""
    iterator = iter(items)

    def take() -> tuple[Item] | None:
        for item in iterator:
            return (item,)
        return None

    with ThreadPoolExecutor(1) as worker:
        pending = deque(worker.submit(take) for _ in range(count))
        while (taken := pending.popleft().result()) is not None:
            pending.append(worker.submit(take))
            yield taken[0]
