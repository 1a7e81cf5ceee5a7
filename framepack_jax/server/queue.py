"""The durable queue: a folder of jobs, each a run folder with a `job.json`.

    server.lock           locked by the server that uses the folder
    video_0123.../        a job: job.json, input_reference and the files of a run
    .new_video_0123...    a job that was not accepted yet; removed at the start
    .deleted_video_...    a job that is being removed; removed at the start

A job exists once its folder has its name. Its state is `error` in job.json, else that of the run.
So a server that is killed at any point finds every accepted job, and resumes unfinished videos.
"""

import contextlib
import fcntl
import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from framepack_jax.server.errors import ApiError
from framepack_jax.server.job import JOB, Job, read_job, run_record, write_job

logger = logging.getLogger(__name__)
LOCK = "server.lock"
PREFIX, NEW, DELETED = "video_", ".new_", ".deleted_"


class JobQueue:
    """Jobs of a folder. Methods may be called from any thread."""

    def __init__(self, folder: Path, max_queue: int) -> None:
        """Read the jobs of a folder that `locked` holds. Raises OSError."""
        self.folder, self.max_queue = folder, max_queue
        self.running: list[Job] = []
        self._changed = threading.Condition()
        self._last = 0
        self._jobs: dict[str, Job] = {}
        for path in sorted(folder.iterdir()):
            if path.name.startswith((NEW, DELETED)):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(PREFIX) and (path / JOB).exists():
                self._read(path)

    def _read(self, path: Path) -> None:
        try:
            job = read_job(path)
        except ValueError as error:
            logger.warning("%s; the job is left out", error)
            return
        if job.deleted:
            self._discard(job)
        else:
            self._jobs[job.id] = job
            self._last = max(self._last, job.created)

    def path(self, job: Job) -> Path:
        """Return the run folder of a job."""
        return self.folder / job.id

    def jobs(self) -> list[Job]:
        """Return all jobs, oldest first."""
        with self._changed:
            return sorted(self._jobs.values(), key=lambda job: job.created)

    def waiting(self) -> list[Job]:
        """Return the jobs with sections left to sample, oldest first."""
        return [job for job in self.jobs() if job.waits]

    def get(self, name: str) -> Job:
        """Return a job. Raises ApiError if there is none of that name."""
        with self._changed:
            if name not in self._jobs:
                raise ApiError(404, f"video {name!r} does not exist", "video_id", "not_found")
            return self._jobs[name]

    def check_room(self) -> None:
        """Raise ApiError if the queue is full."""
        if (count := len(self.waiting())) >= self.max_queue:
            raise ApiError(
                429,
                f"the queue is full ({count} videos); try again when one is finished",
                code="queue_full",
            )

    @contextlib.contextmanager
    def new_folder(self) -> Iterator[Path]:
        """Yield a folder for the files of a new job; it is removed unless `add` takes it."""
        folder = self.folder / f"{NEW}{PREFIX}{secrets.token_hex(12)}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, folder: Path, job: Job) -> None:
        """Accept a job whose files are in a new folder. Raises ApiError if the queue is full,
        OSError if the disk is."""
        with self._changed:
            self.check_room()
            job.id = folder.name.removeprefix(NEW)
            # A clock may be set back.
            job.created = self._last = max(time.time_ns(), self._last + 1)
            write_job(folder, job)
            os.rename(folder, self.path(job))
            self._jobs[job.id] = job
            self._changed.notify_all()

    def take(self, seconds: float, batch: int = 1) -> list[Job]:
        """Return the oldest waiting job and up to `batch` - 1 others of its kind, which are then
        running; none if none comes in time."""
        with self._changed:
            if not self.waiting():
                self._changed.wait(seconds)
            waiting = self.waiting()
            self.running = [job for job in waiting if job.kind == waiting[0].kind][:batch]
            return self.running

    def release(self, errors: Mapping[Job, dict[str, str]]) -> None:
        """End the work on the running jobs: each is finished, failed or deleted, or waits again.
        Raises OSError if the disk is full."""
        with self._changed:
            released, self.running = self.running, []
            for job in released:
                if job.deleted:
                    self._discard(job)
                elif job in errors:
                    job.error = errors[job]
                    write_job(self.path(job), job)

    def steer(self, job: Job, prompt: str) -> None:
        """Add a prompt for the sections of a job that are not begun. Raises ApiError if none is
        left, OSError if the disk is full."""
        with self._changed:
            if not job.waits:
                raise ApiError(
                    400, f"video {job.id} has ended; a prompt changes nothing", code="video_ended"
                )
            if self._in_last_section(job):
                raise ApiError(
                    400,
                    f"the last section of video {job.id} has begun; a prompt changes nothing",
                    code="last_section",
                )
            job.steering.append(prompt)
            try:
                write_job(self.path(job), job)
            except OSError:
                job.steering.pop()
                raise

    def delete(self, job: Job) -> None:
        """Delete a job and its files; those of a running job once the worker stops."""
        with self._changed:
            if self._jobs.pop(job.id, None) is None:
                return
            job.deleted = True
            if job in self.running:
                write_job(self.path(job), job)
            else:
                self._discard(job)

    def _in_last_section(self, job: Job) -> bool:
        sections = run_record(self.path(job)).get("sections", math.inf)
        return job.progress * sections > sections - 1

    def _discard(self, job: Job) -> None:
        grave = self.folder / f"{DELETED}{job.id}"
        os.rename(self.path(job), grave)
        shutil.rmtree(grave, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder of a server and lock it. Raises ValueError if another server uses it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OSError(f"output folder {folder} cannot be written ({error})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(
            f"output folder {folder} is in use by another server; choose another --output"
        ) from None
    finally:
        os.close(lock)
