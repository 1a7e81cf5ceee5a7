"""Clips that turn out to be unreadable while a run trains.

The loader replaces each by another clip (`data.loader`). This module names, counts and keeps them
in checkpoints. The metrics of a step tell all hosts the same ones.
"""

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from framepack_jax.data.records import DatasetError
from framepack_jax.parallel.multihost import is_primary, on_primary
from framepack_jax.utils.messages import MAX_LISTED, shorten
from framepack_jax.utils.progress import Bar


class BadRecords:
    """Numbers of records of a `data.loader.Loader` that could not be read so far; `most` of them
    are replaced."""

    def __init__(self, loader: Any, most: int, numbers: Iterable[int] = ()) -> None:
        self.loader, self.most = loader, most
        self.numbers = set(numbers)

    def __bool__(self) -> bool:
        return bool(self.numbers)

    @property
    def too_many(self) -> bool:
        """More than --data.max-bad-records."""
        return len(self.numbers) > self.most

    def note(self, step: int, clips: np.ndarray) -> bool:
        """Take `Meta.clip` of a step and name the records that are new; returns True if some
        are."""
        new = {-1 - clip for clip in clips.tolist() if clip < 0} - self.numbers
        for number in sorted(new):
            self.numbers.add(number)
            if is_primary():
                count = f"{len(self.numbers)} of --data.max-bad-records {self.most}"
                text = f"{self._fault(number)}; another clip takes its place ({count})"
                Bar.write(f"warning: step {step}: {text}", file=sys.stderr)
        return bool(new)

    def check_again(self) -> None:
        """If there are too many, forget those that can be read by now. Raises DatasetError if there
        still are."""
        if self.too_many:
            self.numbers -= set(
                on_primary(lambda: [n for n in self.numbers if not self.loader.fault(n)])
            )
        self.check()

    def check(self, done: str = "") -> None:
        """Raise DatasetError if there are too many; `done` states what is saved."""
        if self.too_many:
            count = len(self.numbers)
            raise DatasetError(
                f"{count} clips cannot be read, more than --data.max-bad-records {self.most}:"
                f" {self}; {done}repair them, or give --data.max-bad-records {count} or more, and"
                " run the same command again to resume"
            )

    def __str__(self) -> str:
        numbers = sorted(self.numbers)
        # Only faults that are listed are read.
        faults = [*map(self._fault, numbers[:MAX_LISTED]), *map(str, numbers[MAX_LISTED:])]
        return shorten(faults, separator="; ")

    def _fault(self, number: int) -> str:
        # What is wrong names the shard or the video; what can be read by now has a name itself.
        return self.loader.fault(number) or f"clip {self.loader.clip_ids([number])[0]}"
