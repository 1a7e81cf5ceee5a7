"""End a run that hangs, and show where it hangs."""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

# A step takes at most this many times the median step before it counts as hanging.
TIMES_MEDIAN = 10
# Loading, compiling, validating and saving take at most this many times the limit of a step.
TIMES_OTHER = 12
STEPS = 101


class Watchdog:
    """End the process, with the stacks of all its threads, if nothing goes on for too long.

    A step may take `seconds`, or ten times the median of the last hundred; what happens between
    steps may take twelve times as long. 0 seconds: no limit. A hang in one process keeps all others
    in a collective operation, so each finds it by itself.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.durations: deque[float] = deque(maxlen=STEPS)
        self.allow("loading the run")
        self.ended = threading.Event()
        if seconds:
            threading.Thread(target=self._run, daemon=True).start()

    def beat(self, step: int) -> None:
        """Count a finished step."""
        now = time.monotonic()
        if self.what.startswith("step "):
            self.durations.append(now - self.last)
        self.begin_step(step + 1)

    def allow(self, what: str) -> None:
        """Begin something that may take twelve times as long as a step."""
        self.what, self.last, self.limit = what, time.monotonic(), TIMES_OTHER * self.seconds

    @contextlib.contextmanager
    def during(self, what: str, step: int) -> Iterator[None]:
        """Allow more time for what is done after a step."""
        self.allow(what)
        yield
        self.begin_step(step + 1)

    def begin_step(self, step: int) -> None:
        """Expect the end of a step."""
        median = statistics.median(self.durations) if self.durations else 0.0
        limit = max(self.seconds, TIMES_MEDIAN * median)
        self.what, self.last, self.limit = f"step {step}", time.monotonic(), limit

    def close(self) -> None:
        """End the watch."""
        self.ended.set()

    def _run(self) -> None:
        while not self.ended.wait(min(1.0, self.seconds / 4)):
            waited = time.monotonic() - self.last
            if waited > self.limit:
                self._end(waited)

    def _end(self, waited: float) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(
                f"error: {self.what} has taken {waited:.0f} s, more than the {self.limit:.0f} s of"
                " --watchdog-seconds; the stacks of all threads follow",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        os._exit(1)
