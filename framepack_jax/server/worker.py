"""The thread that samples the jobs of the queue, one after another."""

import contextlib
import logging
import threading

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


class Stopped(KeyboardInterrupt):
    """The job was deleted, or the server ends: leave the run as Ctrl-C does."""


class Worker(threading.Thread):
    """Samples waiting jobs until `stop`. `progress` is the sampled fraction of the running one."""

    def __init__(self, model: ServedModel, queue: JobQueue) -> None:
        super().__init__(name="worker", daemon=True)
        self.model, self.queue = model, queue
        self.progress = 0.0
        self._ending = threading.Event()

    def stop(self, seconds: float | None = None) -> None:
        """End after the step in progress; wait for that at most some seconds."""
        self._ending.set()
        self.join(seconds)

    def run(self) -> None:
        """Sample jobs until the server ends."""
        with use_attention(self.model.maker.compute.attention):
            while not self._ending.is_set():
                job = self.queue.take(IDLE_SECONDS)
                if job is not None:
                    self._release(job, self._sample(job))

    def _sample(self, job: Job) -> dict[str, str] | None:
        """Sample a job or what is left of it; return the error, if any."""
        self.progress = 0.0
        folder = self.queue.path(job)
        try:
            task = self.model.task(job.spec(folder), folder)
            if task is not None:
                self._make(job, task)
            job.finished = True
            logger.info("%s: completed", job.id)
        except Stopped:
            logger.info("%s: %s", job.id, "deleted" if job.deleted else "interrupted")
        except (ValueError, FloatingPointError, *FAILURES) as error:
            logger.error("%s: error: %s", job.id, explained(error))
            return {"code": "sampling_failed", "message": str(explained(error))}
        except Exception:
            logger.exception("%s: error in the server", job.id)
            return {"code": "server_error", "message": "error in the server; its log has details"}
        return None

    def _make(self, job: Job, task: Task) -> None:
        """Sample and decode a task. Raises Stopped, ValueError, OSError, RuntimeError."""

        def on_progress(fraction: float) -> None:
            self.progress = fraction
            if job.deleted or self._ending.is_set():
                raise Stopped

        task.on_progress = on_progress
        for _, error in make_all(self.model.pipe, [task]):
            if error is not None:
                raise error

    def _release(self, job: Job, error: dict[str, str] | None) -> None:
        with contextlib.suppress(OSError):  # a full disk; the error is logged
            self.queue.release(job, error)
