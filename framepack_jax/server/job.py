"""`job.json`: what a client asked for, in the run folder of the video."""

import dataclasses
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from etils import epath

from framepack_jax.jobs.record import RECORD
from framepack_jax.jobs.run_files import write_whole
from framepack_jax.jobs.spec import VideoSpec

JOB, UPLOAD = "job.json", "input_reference"
FORMAT = 1


@dataclasses.dataclass(eq=False)
class Job:
    """A video that a client asked for.

    Args:
        id: Name of the job and of its folder.
        created: Time in nanoseconds since 1970; the order of the queue.
        model: Name of the bundle.
        seconds: Length as it was asked for.
        size: WIDTHxHEIGHT in pixels.
        options: Fields of a `VideoSpec` other than the image.
        has_image: True if the folder holds an uploaded start image.
        steering: Prompts that were sent since, oldest first.
        error: Code and message of a failure.
        finished: True if the video is complete; derived from the run folder.
        deleted: True once a client deleted the job; its folder is about to be removed.
        progress: Sampled fraction, while the job is running.
    """

    id: str
    created: int
    model: str
    seconds: str
    size: str
    options: dict[str, Any]
    has_image: bool = False
    steering: list[str] = dataclasses.field(default_factory=list)
    error: dict[str, str] | None = None
    finished: bool = False
    deleted: bool = False
    progress: float = 0.0

    def spec(self, folder: Path) -> VideoSpec:
        """Return the options of the video; the image is in the folder of the job."""
        return VideoSpec(**self.options, image=folder / UPLOAD if self.has_image else None)

    @property
    def kind(self) -> Hashable:
        """Key that is equal for jobs that may be sampled side by side."""
        options = {k: v for k, v in self.options.items() if k not in OF_ONE}
        return self.size, self.seconds, self.has_image, tuple(sorted(options.items()))

    @property
    def waits(self) -> bool:
        """True if sections are left to sample."""
        return not self.finished and self.error is None


# Fields that the run folder and the worker tell.
DERIVED = ("finished", "progress")
# Options in which the videos of a batch may differ.
OF_ONE = ("prompt", "negative_prompt", "seed")


def write_job(folder: Path, job: Job) -> None:
    """Write a job atomically. Raises OSError."""
    fields = {k: v for k, v in dataclasses.asdict(job).items() if k not in DERIVED}
    text = json.dumps({"format": FORMAT} | fields, indent=1, ensure_ascii=False)
    write_whole(epath.Path(folder / JOB), text.encode())


def read_job(folder: Path) -> Job:
    """Read a job and whether its video is complete. Raises ValueError if a file is damaged."""
    try:
        fields = json.loads((folder / JOB).read_text())
        if (version := fields.pop("format")) != FORMAT:
            raise ValueError(f"its format is {version}, expected {FORMAT}")
        job = Job(**fields)
        if job.id != folder.name:
            raise ValueError(f"it is the job {job.id}")
        job.finished = run_record(folder).get("status") == "finished"
        return job
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / JOB} cannot be read ({error})") from error


def run_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run, empty before the run was begun. Raises ValueError, OSError."""
    try:
        return json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return {}
