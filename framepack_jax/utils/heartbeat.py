"""Tell other programs how far a training run is."""

import contextlib
import json
import os
import time

from etils import epath

from framepack_jax.utils.files import atomic_write_text
from framepack_jax.utils.paths import is_remote

# The file named by this variable also gets heartbeats, those of every process.
VARIABLE = "FRAMEPACK_HEARTBEAT"
HEARTBEAT = "heartbeat.json"
# Seconds between two writes, to a disk and to an object store.
BETWEEN_BEATS, BETWEEN_REMOTE_BEATS = 1.0, 30.0


class Heartbeat:
    """Write the newest step to RUN/heartbeat.json in the first process, and to the file that the
    environment names in every process."""

    def __init__(self, run: epath.PathLike | None) -> None:
        self.files = [] if run is None else [(epath.Path(run) / HEARTBEAT, _pause(run))]
        if named := os.environ.get(VARIABLE):
            self.files.append((epath.Path(named), BETWEEN_BEATS))
        self.next = [0.0] * len(self.files)

    def beat(self, step: int) -> None:
        """Write a step, at most once a second, to an object store once in thirty."""
        now = time.monotonic()
        for i, (file, pause) in enumerate(self.files):
            if now >= self.next[i]:
                self.next[i] = now + pause
                with contextlib.suppress(OSError):  # a heartbeat that fails harms nothing
                    atomic_write_text(file, json.dumps({"step": step, "time": time.time()}) + "\n")


def _pause(run: epath.PathLike) -> float:
    return BETWEEN_REMOTE_BEATS if is_remote(run) else BETWEEN_BEATS


def read_heartbeat(file: epath.PathLike) -> int | None:
    """Return the step of a heartbeat file, None if there is none."""
    try:
        return int(json.loads(epath.Path(file).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
