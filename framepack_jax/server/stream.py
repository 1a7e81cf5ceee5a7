"""A video as a stream: each segment of final frames as soon as it touches the ones before it."""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from etils import epath
from fastapi.concurrency import run_in_threadpool

from framepack_jax import video
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.server.job import Job

# Seconds between two looks at a run.
BETWEEN_LOOKS = 0.25


async def video_pieces(job: Job, folder: Path) -> AsyncIterator[bytes]:
    """Yield a fragmented mp4 file until the video is completed, failed or deleted.

    An order that makes the beginning last gives it all at the end.
    """
    waiting: collections.deque[epath.Path] = collections.deque()
    pieces = video.fragment_mp4(iter(waiting.popleft, None))
    sent = 0
    while not job.deleted:
        ends = not job.waits
        there = await run_in_threadpool(_segments, folder)
        waiting.extend(there[sent:])
        sent = max(sent, len(there))
        while waiting:
            yield await run_in_threadpool(next, pieces)
        if ends:
            return
        await asyncio.sleep(BETWEEN_LOOKS)


def _segments(folder: Path) -> list[epath.Path]:
    """Return the segments of a run that touch each other, none before it has begun."""
    with contextlib.suppress(ValueError):
        return RunDir.open(epath.Path(folder)).segments()
    return []
