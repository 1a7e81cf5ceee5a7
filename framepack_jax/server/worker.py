"""The thread that samples the jobs of the queue, the oldest first."""

import contextlib
import logging
import threading
from collections.abc import Sequence

from framepack_jax.jobs.errors import FAILURES, explained
from framepack_jax.jobs.runner import make_all
from framepack_jax.jobs.task import Task
from framepack_jax.ops.attention import use as use_attention
from framepack_jax.server.job import Job
from framepack_jax.server.model import ServedModel
from framepack_jax.server.queue import JobQueue

logger = logging.getLogger(__name__)
# Seconds between two looks at the queue.
IDLE_SECONDS = 0.2
FAILED = (ValueError, FloatingPointError, *FAILURES)


class Stopped(KeyboardInterrupt):
    """The job was deleted, or the server ends: leave the run as Ctrl-C does."""


class Worker(threading.Thread):
    """Samples waiting jobs until `stop`."""

    def __init__(self, model: ServedModel, queue: JobQueue) -> None:
        super().__init__(name="worker", daemon=True)
        self.model, self.queue = model, queue
        self._ending = threading.Event()

    def stop(self, seconds: float | None = None) -> None:
        """End after the step in progress; wait for that at most some seconds."""
        self._ending.set()
        self.join(seconds)

    def run(self) -> None:
        """Sample jobs until the server ends."""
        with use_attention(self.model.maker.compute.attention):
            while not self._ending.is_set():
                if jobs := self.queue.take(IDLE_SECONDS, self.model.batch):
                    errors = self._sample(jobs)
                    with contextlib.suppress(OSError):  # a full disk; the errors are logged
                        self.queue.release(errors)

    def _sample(self, jobs: Sequence[Job]) -> dict[Job, dict[str, str]]:
        """Sample jobs, or what is left of them; return the errors."""
        errors: dict[Job, dict[str, str]] = {}
        tasks: dict[Task, Job] = {}
        try:
            for job in jobs:
                try:
                    self._add_task(job, tasks)
                except FAILED as error:
                    errors[job] = sampling_failed(job, error)
            for task, failure in make_all(self.model.pipe, list(tasks), self.model.batch):
                job = tasks[task]
                if failure is None:
                    self._finish(job)
                else:
                    errors[job] = sampling_failed(job, failure)
        except Stopped:
            for job in jobs:
                logger.info("%s: %s", job.id, "deleted" if job.deleted else "interrupted")
        except FAILED as error:
            errors |= {job: sampling_failed(job, error) for job in jobs if job.waits}
        except Exception:
            logger.exception("error in the server")
            message = "error in the server; its log has details"
            failed = {"code": "server_error", "message": message}
            errors |= {job: failed for job in jobs if job.waits and job not in errors}
        return errors

    def _add_task(self, job: Job, tasks: dict[Task, Job]) -> None:
        """Add the task of a job, unless its video is complete. Raises ValueError, OSError."""
        job.progress = 0.0
        folder = self.queue.path(job)
        task = self.model.task(job.spec(folder), folder)
        if task is None:
            return self._finish(job)

        def on_progress(fraction: float) -> None:
            job.progress = fraction
            if job.deleted or self._ending.is_set():
                raise Stopped

        task.on_progress = on_progress
        task.steering = lambda: job.steering
        tasks[task] = job

    def _finish(self, job: Job) -> None:
        job.finished = True
        logger.info("%s: completed", job.id)


def sampling_failed(job: Job, error: Exception) -> dict[str, str]:
    """Log the failure of a job; return its code and message."""
    logger.error("%s: error: %s", job.id, explained(error))
    return {"code": "sampling_failed", "message": str(explained(error))}
