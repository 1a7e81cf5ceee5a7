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

JOB = "job.json"
# Uploads of a request: the start image or the video to continue, the last frame, and key frames.
UPLOAD, END, KEY_FRAME = "input_reference", "end_image", "key_frame"
FORMAT = 2


@dataclasses.dataclass(eq=False)
class Job:
    """A video that a client asked for.

    Args:
        id: Name of the job and of its folder.
        created: Time in nanoseconds since 1970; the order of the queue.
        model: Name of the bundle.
        seconds: Length as it was asked for.
        size: WIDTHxHEIGHT in pixels.
        options: Fields of a `VideoSpec` that name no file.
        files: Names of uploads in the folder, by the field of a `VideoSpec`: image, extend or
            end_image.
        key_frames: Names and times in seconds of uploaded key frames.
        extends: Name of the job whose video is continued, or None.
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
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    key_frames: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    extends: str | None = None
    steering: list[str] = dataclasses.field(default_factory=list)
    error: dict[str, str] | None = None
    finished: bool = False
    deleted: bool = False
    progress: float = 0.0

    def spec(self, folder: Path) -> VideoSpec:
        """Return the options of the video, whose uploads are in the folder of the job."""
        paths: dict[str, Any] = {name: folder / file for name, file in self.files.items()}
        if self.extends is not None:
            paths["extend"] = folder.parent / self.extends
        keys = tuple(f"{seconds:g}s={folder / name}" for name, seconds in self.key_frames)
        return VideoSpec(**self.options, **paths, key_frame=keys)

    @property
    def kind(self) -> Hashable:
        """Key that is equal for jobs that may be sampled side by side."""
        options = {k: v for k, v in self.options.items() if k not in OF_ONE}
        keys = tuple(seconds for _, seconds in self.key_frames)
        inputs = (*sorted(self.files), keys, self.extends is None)
        return self.size, self.seconds, inputs, tuple(sorted(options.items()))

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
        job = Job(**_upgraded(fields))
        if job.id != folder.name:
            raise ValueError(f"it is the job {job.id}")
        job.finished = run_record(folder).get("status") == "finished"
        return job
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / JOB} cannot be read ({error})") from error


def _upgraded(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a job of any format. Raises ValueError, KeyError."""
    version = fields.pop("format")
    if version == 1:
        fields["files"] = {"image": UPLOAD} if fields.pop("has_image") else {}
    elif version != FORMAT:
        raise ValueError(f"its format is {version}, expected {FORMAT}")
    fields["key_frames"] = [(name, seconds) for name, seconds in fields.get("key_frames", [])]
    return fields


def run_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run, empty before the run was begun. Raises ValueError, OSError."""
    try:
        return json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return {}
