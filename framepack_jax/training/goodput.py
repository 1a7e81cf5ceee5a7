"""Count where the time of a run goes, over all its lives: from each start to a failure or stop.

    RUN/lives/0000.json    first and last step, and seconds by kind of work, of the first life

The part of the whole time that made steps which the run still has is called goodput.
"""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from framepack_jax.utils.files import atomic_write_text

FOLDER = "lives"
# Kinds of work, and how a summary names them.
KINDS = {
    "load": "loading and restoring",
    "compile": "compiling",
    "step": "useful steps",
    "lost": "steps that were lost",
    "wait": "waiting for data",
    "save": "saving",
    "validate": "validating",
    "down": "between lives",
}
# Seconds between two writes.
BETWEEN_WRITES = 30.0


class Life:
    """Count the seconds of this life by kind, and write them to `run`, if that is not None."""

    def __init__(self, run: epath.PathLike | None) -> None:
        self.began = time.time()
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.first = self.last = 0
        self.kind, self.since = "load", time.monotonic()
        self.file: epath.Path | None = None
        self.earlier: list[dict[str, Any]] = []
        self.written = time.monotonic()
        if run is not None:
            self.earlier = read_lives(run)
            self.file = epath.Path(run) / FOLDER / f"{len(self.earlier):04d}.json"

    def switch(self, kind: str) -> str:
        """Count time as another kind from now on; return the kind before."""
        now, before = time.monotonic(), self.kind
        self.seconds[before] += now - self.since
        self.kind, self.since = kind, now
        return before

    def waited(self, seconds: float) -> None:
        """Count some of the time of the step as a wait for data."""
        self.seconds["wait"] += seconds
        self.seconds["step"] -= seconds

    def begin(self, first: int) -> None:
        """Begin the steps after `first`."""
        self.first = self.last = first
        self.switch("step")

    def write(self, last: int, *, now: bool = False) -> None:
        """Note the newest step; write the file if the last write is some time ago, or now."""
        self.last = last
        self.switch(self.kind)
        if self.file is None or not (now or time.monotonic() >= self.written + BETWEEN_WRITES):
            return
        self.written = time.monotonic()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.file, json.dumps(self.record(), indent=1) + "\n")

    def record(self) -> dict[str, Any]:
        """Return what the file holds."""
        seconds = {kind: round(spent, 3) for kind, spent in self.seconds.items()}
        return {
            "began": self.began, "ended": time.time(), "first": self.first, "last": self.last,
            "seconds": seconds,
        }  # fmt: skip

    def summary(self) -> dict[str, float]:
        """Return the seconds by kind of all lives up to now."""
        return summarize([*self.earlier, self.record()])


def read_lives(run: epath.PathLike) -> list[dict[str, Any]]:
    """Return the records of all lives of a run, in order."""
    return [json.loads(file.read_text()) for file in _files(run)]


def _files(run: epath.PathLike) -> Iterator[epath.Path]:
    folder = epath.Path(run) / FOLDER
    if folder.exists():
        yield from sorted(file for file in folder.iterdir() if file.name.endswith(".json"))


def summarize(lives: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Add up the seconds by kind. Steps that a later life took again count as lost."""
    total = dict.fromkeys(KINDS, 0.0)
    for number, life in enumerate(lives):
        for kind, seconds in life["seconds"].items():
            total[kind] += seconds
        if later := [each["first"] for each in lives[number + 1 :]]:
            taken = life["last"] - life["first"]
            repeated = max(0, life["last"] - max(life["first"], min(later)))
            lost = life["seconds"]["step"] * repeated / taken if taken else 0.0
            total["step"] -= lost
            total["lost"] += lost
            total["down"] += max(0.0, lives[number + 1]["began"] - life["ended"])
    return total


def goodput(total: dict[str, float]) -> float:
    """Return the part of the time that went into useful steps."""
    return total["step"] / max(sum(total.values()), 1e-9)


def line(total: dict[str, float], lives: int) -> str:
    """Describe where the time went, the largest part first."""
    spent = sorted(total.items(), key=lambda item: -item[1])
    parts = [f"{KINDS[kind]} {_duration(seconds)}" for kind, seconds in spent if seconds >= 0.5]
    return (
        f"goodput      {goodput(total):.0%} of {_duration(sum(total.values()))} in {lives}"
        f" {'lives' if lives > 1 else 'life'}: {', '.join(parts)}"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
