"""Server-sent events: the `video` object of a job each time that it changes."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from framepack_jax.server.job import Job

# Seconds between two looks at a job, and between two signs of life.
BETWEEN_LOOKS, BETWEEN_SIGNS = 0.25, 15.0


async def video_events(job: Job, body: Callable[[], dict[str, Any]]) -> AsyncIterator[str]:
    """Yield events until the video is completed, failed or deleted."""
    last, sent = "", time.monotonic()
    while not job.deleted:
        ends = not job.waits
        text = json.dumps(body())
        if text != last:
            yield f"event: video\ndata: {text}\n\n"
        elif time.monotonic() - sent > BETWEEN_SIGNS:
            yield ": waiting\n\n"
        else:
            await asyncio.sleep(BETWEEN_LOOKS)
            continue
        last, sent = text, time.monotonic()
        if ends:
            return
    yield f"event: video.deleted\ndata: {json.dumps({'id': job.id, 'deleted': True})}\n\n"
