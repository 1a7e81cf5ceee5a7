"""Bodies of responses, in the form of OpenAI's videos API."""

import contextlib
from typing import Any

from framepack_jax.jobs.record import RECORD
from framepack_jax.server.job import Job, run_record
from framepack_jax.server.queue import JobQueue

NANOSECONDS = 10**9


def video_body(queue: JobQueue, job: Job) -> dict[str, Any]:
    """Return the `video` object of a job."""
    status = _status(queue, job)
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": status,
        "progress": _progress(queue, job, status),
        "created_at": job.created // NANOSECONDS,
        "completed_at": _completed_at(queue, job),
        "expires_at": None,
        "prompt": job.options["prompt"],
        "seconds": job.seconds,
        "size": job.size,
        "seed": job.options["seed"],
        "steering": job.steering,
        "remixed_from_video_id": None,
        "error": job.error,
    }


def _status(queue: JobQueue, job: Job) -> str:
    if job.error is not None:
        return "failed"
    if job.finished:
        return "completed"
    return "in_progress" if job in queue.running else "queued"


def _progress(queue: JobQueue, job: Job, status: str) -> int:
    """Return the sampled percentage; 100 only for a complete video."""
    if status == "completed":
        return 100
    if status == "in_progress":
        return min(99, int(100 * job.progress))
    with contextlib.suppress(OSError, ValueError):
        if sections := run_record(queue.path(job)).get("sections"):
            done = len(list((queue.path(job) / "latents").glob("section_*.npz")))
            return min(99, 100 * done // sections)
    return 0


def _completed_at(queue: JobQueue, job: Job) -> int | None:
    """Return the time of the last change of a finished run."""
    with contextlib.suppress(OSError):
        if job.finished:
            return int((queue.path(job) / RECORD).stat().st_mtime)
    return None


def list_body(videos: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """Return a page of a list."""
    ends = (videos[0]["id"], videos[-1]["id"]) if videos else (None, None)
    return {
        "object": "list",
        "data": videos,
        "first_id": ends[0],
        "last_id": ends[1],
        "has_more": has_more,
    }


def deleted_body(job: Job) -> dict[str, Any]:
    """Return the answer to DELETE."""
    return {"id": job.id, "object": "video.deleted", "deleted": True}
