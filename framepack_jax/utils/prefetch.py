"""Produce items in a thread before they are used."""

import collections
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

# Items that are produced while others are used.
AHEAD = 4
JOIN_SECONDS = 5
Item = TypeVar("Item")
Result = TypeVar("Result")


class _Buffer(Generic[Item]):
    """State shared by the thread and the iterator: free slots, and items or the final error."""

    def __init__(self, slots: int) -> None:
        self.slots = threading.Semaphore(slots)
        self.ready: queue.SimpleQueue[tuple[Item] | BaseException] = queue.SimpleQueue()
        self.closed = threading.Event()

    def fill(self, items: Iterable[Item]) -> None:
        """Produce one item for each free slot until they end or the buffer is closed."""
        try:
            iterator = iter(items)
            while not self.closed.is_set():
                self.slots.acquire()
                if not self.closed.is_set():
                    self.ready.put((next(iterator),))
            self.ready.put(StopIteration())
        except BaseException as error:
            self.ready.put(error)


class Prefetched(Iterator[Item]):
    """Iterator over items that a thread produces. See `prefetch`."""

    def __init__(self, items: Iterable[Item], count: int) -> None:
        # The thread holds the buffer alone, so that an abandoned iterator is collected and closed.
        self._buffer: _Buffer[Item] = _Buffer(count)
        self._thread = threading.Thread(target=self._buffer.fill, args=(items,), daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        item = self._buffer.ready.get()
        if isinstance(item, BaseException):
            # The thread has ended: the next call meets the same error, or the end.
            self._buffer.ready.put(item)
            raise item
        self._buffer.slots.release()
        return item[0]

    def close(self) -> None:
        """End the thread, and wait some seconds for the item that it is producing."""
        self._end()
        self._thread.join(JOIN_SECONDS)

    def _end(self) -> None:
        self._buffer.closed.set()
        self._buffer.slots.release()

    def __del__(self) -> None:
        self._end()


def prefetch(items: Iterable[Item], count: int = AHEAD) -> Prefetched[Item]:
    """Iterate over items that a thread produces, starting now, at most `count` of them ahead.

    An error of the items is raised in their place. `close` ends the thread early.
    """
    return Prefetched(items, count)


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    count: int = 8,
    ahead: int | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Yield (item, result) in order; `count` threads work on the next `ahead` items (default:
    `count`). The items are taken in this thread."""
    items = iter(items)
    pool = ThreadPoolExecutor(count)
    try:
        waiting = collections.deque(
            (item, pool.submit(function, item)) for item in itertools.islice(items, ahead or count)
        )
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
            waiting.extend((n, pool.submit(function, n)) for n in itertools.islice(items, 1))
    finally:
        pool.shutdown(cancel_futures=True)
