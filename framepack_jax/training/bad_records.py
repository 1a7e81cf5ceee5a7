"""Clips that could not be read during a run.

The loader replaces each by another clip (`data.loader`). This module names and counts them, and
checkpoints store their numbers. The metrics of a step give all hosts the same numbers.
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
    """Numbers of the records of a `data.loader.Loader` that could not be read so far. The run ends
    if there are more than `most`."""

    def __init__(self, loader: Any, most: int, numbers: Iterable[int] = ()) -> None:
        self.loader, self.most = loader, most
        self.numbers = set(numbers)

    def __bool__(self) -> bool:
        return bool(self.numbers)

    @property
    def too_many(self) -> bool:
        """Return True if there are more than --data.max-bad-records."""
        return len(self.numbers) > self.most

    def note(self, step: int, clips: np.ndarray) -> bool:
        """Add the unreadable records in `Meta.clip` of a step and print the new ones.
        Returns True if there are new ones."""
        new = {-1 - clip for clip in clips.tolist() if clip < 0} - self.numbers
        for number in sorted(new):
            self.numbers.add(number)
            if is_primary():
                count = f"{len(self.numbers)} of --data.max-bad-records {self.most}"
                text = f"{self._fault(number)}; another clip takes its place ({count})"
                Bar.write(f"warning: step {step}: {text}", file=sys.stderr)
        return bool(new)

    def check_again(self) -> None:
        """If there are too many, drop the records that can be read by now.

        Raises DatasetError if too many remain."""
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
        # Only the listed records are read again.
        faults = [*map(self._fault, numbers[:MAX_LISTED]), *map(str, numbers[MAX_LISTED:])]
        return shorten(faults, separator="; ")

    def _fault(self, number: int) -> str:
        # A fault names the shard or the video. A record that can be read by now has none.
        return self.loader.fault(number) or f"clip {self.loader.clip_ids([number])[0]}"
