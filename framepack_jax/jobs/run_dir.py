"""A run folder: all that is needed to continue a video, to decode it again, or to sample it again.

    run.json                        flags, seed, schedule and order, hashes, versions, timings
    run.lock                        empty; locked by the process that works on the run
    inputs/                         prepared images, and the end of an extended video
    latents/known.npz               given latents: start image, end image (as a guide: at the
                                    position after the video), key frames, extended video
    latents/section_000.npz         latents of a section, written before they are decoded
    segments/frames_00000000.mp4    final frames, starting at that number, each encoded once
    video.mp4                       the first contiguous segments, joined without encoding again
    frames/frame_000000.png         with --png, each final frame as a picture
    preview.png                     the section that is being sampled; at the end, a contact sheet
    video.gif                       with --gif

Every file appears whole or not at all, so that a run can be stopped at any point. An .npz file of
latents holds `positions` (F,) and `latents` (F, H, W, C) float32, normalised. Of several processes,
the first reads and writes the folder; the others receive the results.
"""

import contextlib
import fcntl
import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from etils import epath

from framepack_jax import video
from framepack_jax.generation.request import Request, SourceVideo
from framepack_jax.jobs import run_files
from framepack_jax.jobs.record import RECORD, read_record, write_record
from framepack_jax.jobs.run_files import (
    FILES,
    DamagedFile,
    key_frame_name,
    load_arrays,
    save_arrays,
)
from framepack_jax.jobs.video_tags import tags
from framepack_jax.packing import Section
from framepack_jax.parallel.multihost import is_primary, on_primary
from framepack_jax.utils.files import local_copy
from framepack_jax.utils.paths import is_remote

P = ParamSpec("P")
T = TypeVar("T")
LOCK = "run.lock"
LATENTS = ("positions", "latents")


def _by_primary(
    method: Callable[Concatenate["RunDir", P], T],
) -> Callable[Concatenate["RunDir", P], T]:
    """Run a method that reads or writes files on the first host; all hosts get its result and the
    record."""

    @functools.wraps(method)
    def call(self: "RunDir", *args: P.args, **kwargs: P.kwargs) -> T:
        def work() -> tuple[T, dict[str, Any]]:
            return method(self, *args, **kwargs), self.record

        result, self.record = on_primary(work)
        return result

    return call


class RunDir:
    """A run folder, and its record from `run.json`."""

    def __init__(self, folder: epath.Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self.record = record
        self._lock: int | None = None

    @classmethod
    def open(cls, folder: epath.Path) -> "RunDir":
        """Read the record. Raises ValueError if it is missing or damaged."""
        return cls(folder, on_primary(read_record, folder))

    @classmethod
    @contextlib.contextmanager
    def locked(cls, folder: epath.Path) -> Iterator["RunDir"]:
        """Open and lock a run, and read its record again. Raises Busy, ValueError."""
        run = cls.open(folder)
        run.lock()
        try:
            run.record = on_primary(read_record, folder)
            yield run
        finally:
            run.unlock()

    @_by_primary
    def begin(
        self,
        request: Request,
        known: Mapping[int, np.ndarray],
        beginning: Iterable[np.ndarray] | None,
    ) -> None:
        """Make the folder, or remove an earlier run from it, and save the inputs of the run.

        The status is "beginning" until all inputs are saved; such a run cannot be resumed.

        Args:
            request: The prepared request.
            known: Given latents (H, W, C) by position.
            beginning: Frames of an extended video that no section changes; the record has their
                number.
        """
        check_folder(self.folder)
        self.lock()
        self.write_record(status="beginning")
        for name, patterns in FILES.items():
            (self.folder / name).mkdir(exist_ok=True)
            for file in (f for pattern in patterns for f in (self.folder / name).glob(pattern)):
                file.unlink()
        for name, image in run_files.pictures(request).items():
            video.save_png(self.folder / "inputs" / f"{name}.png", image)
        if request.source_video is not None:
            frames = request.source_video.frames
            last = request.source_video.last[self.record["beginning"] - frames :]
            arrays = {"frames": np.asarray(frames), "last": last}
            save_arrays(self.folder / "inputs" / "footage.npz", arrays)
        self.save_known(known)
        if beginning is not None:
            self._write_segment(0, beginning)
        self.write_record(status="begun")

    @_by_primary
    def lock(self) -> None:
        """Lock the run until `unlock` or the end of this process. Raises Busy if another process
        has locked it. Warns if the file system has no locks."""
        if self._lock is not None:
            return
        if is_remote(self.folder):
            _warn_without_lock(self.folder, "an object store has no locks")
            return
        try:
            # NFS locks only files that are open for writing.
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(f"run {self.folder} cannot be written ({error})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise Busy(f"{self.folder} is in use by another process") from None
        except OSError as error:
            _warn_without_lock(self.folder, error.strerror)
        self._lock = lock

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @_by_primary
    def write_record(self, **changes: Any) -> None:
        """Change the record and write it."""
        self.record |= changes
        write_record(self.folder, self.record)

    def note(self, status: str) -> None:
        """Write the final status of a run. Do not communicate with other processes, which may be
        gone, and ignore a full disk."""
        self.record["status"] = status
        if is_primary():
            with contextlib.suppress(OSError):
                write_record(self.folder, self.record)

    @_by_primary
    def request(self) -> Request:
        """Read the prepared request that `begin` saved. Raises ValueError if a file is missing."""
        flags, inputs = self.record["flags"], self.folder / "inputs"
        source_video = None
        if flags["extend"] is not None:
            kept = load_arrays(inputs / "footage.npz", "frames", "last")
            source_video = SourceVideo(int(kept["frames"]), kept["last"][0], kept["last"])
        empty = self.record.get("starts_empty", False)
        end = inputs / "end_image.png"
        return Request(
            prompt=flags["prompt"],
            image=None if empty else run_files.open_picture(inputs / "image.png"),
            negative_prompt=flags["negative_prompt"],
            seed=flags["seed"],
            end_image=run_files.open_picture(end) if end.exists() else None,
            end_image_as=flags["end_image_as"],
            key_frames=tuple(
                (seconds, run_files.open_picture(inputs / f"{key_frame_name(i)}.png"))
                for i, seconds in enumerate(self.record["key_frames"])
            ),
            source_video=source_video,
        )

    # Latents

    @_by_primary
    def known(self) -> dict[int, np.ndarray]:
        """Read the given latents (H, W, C) by position. Raises DamagedFile, OSError."""
        arrays = load_arrays(self.folder / "latents" / "known.npz", *LATENTS)
        return dict(zip(arrays["positions"].tolist(), arrays["latents"], strict=True))

    @_by_primary
    def save_known(self, known: Mapping[int, np.ndarray]) -> None:
        """Save given latents (H, W, C) by position."""
        positions = np.asarray(list(known), int)
        latents = np.stack(list(known.values())) if known else np.zeros(0, np.float32)
        arrays = {"positions": positions, "latents": latents}
        save_arrays(self.folder / "latents" / "known.npz", arrays)

    @_by_primary
    def save_section(self, number: int, section: Section, latents: np.ndarray) -> None:
        """Save the latents (w, H, W, C) of a section."""
        arrays = {"positions": np.asarray(section.targets), "latents": latents}
        save_arrays(self._section_file(number), arrays)

    @_by_primary
    def has_sections(self) -> bool:
        """Return whether any section is finished."""
        return self.record["status"] != "beginning" and self._section_file(0).exists()

    @_by_primary
    def sections(self, plan: Sequence[Section], shape: tuple[int, ...]) -> list[np.ndarray]:
        """Read the latents (w, H, W, C) of the finished sections; `shape` is (H, W, C).

        Raises DamagedFile, which holds the sections before the damaged one.
        """
        latents: list[np.ndarray] = []
        for number, section in enumerate(plan):
            file = self._section_file(number)
            if not file.exists():
                break
            try:
                arrays = load_arrays(file, *LATENTS)
                if tuple(arrays["positions"]) != section.targets:
                    raise DamagedFile(f"{file} holds other positions than the plan")
                if arrays["latents"].shape != (len(section.targets), *shape):
                    raise DamagedFile(f"{file} holds latents {arrays['latents'].shape}")
            except DamagedFile as error:
                error.done = latents
                raise
            latents.append(arrays["latents"])
        return latents

    @_by_primary
    def latents(self) -> dict[int, np.ndarray]:
        """Read all latents (H, W, C) by position. Raises DamagedFile."""
        latents: dict[int, np.ndarray] = {}
        for file in sorted((self.folder / "latents").glob("*.npz")):
            arrays = load_arrays(file, *LATENTS)
            latents |= dict(zip(arrays["positions"].tolist(), arrays["latents"], strict=True))
        return latents

    def _section_file(self, number: int) -> epath.Path:
        return self.folder / "latents" / f"section_{number:03d}.npz"

    # Prompts

    def prompt(self, section: int) -> str:
        """Return the prompt that leads a section: that of the flags, or the last one that was given
        for it or for a section before it."""
        prompt = self.record["flags"]["prompt"]
        for begin, given in self.record.get("steered", []):
            prompt = given if begin <= section else prompt
        return prompt

    @_by_primary
    def steer(self, section: int, prompts: Sequence[str]) -> None:
        """Record prompts that were given before a section, which the last of them leads."""
        steered = [*self.record.get("steered", []), *([section, prompt] for prompt in prompts)]
        self.write_record(steered=steered)

    # Frames

    @_by_primary
    def spans(self) -> int:
        """Count the clips, from the first on, whose frames are all in segments."""
        for number, (start, stop) in enumerate(self.record["spans"]):
            if stop == start:
                continue
            try:
                with local_copy(self._segment(start)) as segment:
                    if video.mp4_info(segment).frames != stop - start:
                        return number
            except (ValueError, FileNotFoundError):  # missing, or damaged
                return number
        return len(self.record["spans"])

    @_by_primary
    def add_span(self, number: int, start: int, frames: np.ndarray) -> None:
        """Encode the frames (P, height, width, 3) uint8 that became final with clip `number`, and
        write `video.mp4` again."""
        if len(frames):
            self._write_segment(start, frames)
        spans = [*self.record["spans"][:number], [start, start + len(frames)]]
        self.write_record(spans=spans)
        self.join()

    @_by_primary
    def join(self) -> None:
        """Write `video.mp4` from the segments, up to the first missing one."""
        if touching := self.touching():
            with contextlib.ExitStack() as copies:
                segments = [
                    copies.enter_context(local_copy(self._segment(start))) for start, _ in touching
                ]
                video.join_mp4(self.folder / "video.mp4", segments, tags(self.record))

    def touching(self) -> list[tuple[int, int]]:
        """Return the first and the last but one frame of each segment from the first that exists to
        the next missing one."""
        spans = [(0, self.record["beginning"]), *map(tuple, self.record["spans"])]
        touching: list[tuple[int, int]] = []
        for start, stop in sorted(span for span in spans if span[1] > span[0]):
            if not self._segment(start).exists():
                continue
            if touching and start != touching[-1][1]:
                break
            touching.append((start, stop))
        return touching

    def segments(self) -> list[epath.Path]:
        """Return the segments from frame 0 to the first missing one."""
        touching = self.touching()
        begun = bool(touching) and touching[0][0] == 0
        return [self._segment(start) for start, _ in touching] if begun else []

    def _segment(self, start: int) -> epath.Path:
        return self.folder / "segments" / f"frames_{start:08d}.mp4"

    def _write_segment(self, start: int, frames: Iterable[np.ndarray]) -> None:
        flags = self.record["flags"]
        if flags.get("png", False):
            (self.folder / "frames").mkdir(exist_ok=True)
            frames = self._with_pictures(start, frames)
        video.write_mp4(self._segment(start), frames, fps=flags["fps"], crf=flags["crf"])

    def _with_pictures(self, start: int, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for number, frame in enumerate(frames, start):
            video.save_png(self.folder / "frames" / f"frame_{number:06d}.png", frame)
            yield frame


def check_free(folder: epath.Path) -> None:
    """Raise Busy if another process works on the run in a folder."""
    run = RunDir(folder, {})
    run.lock()
    run.unlock()


def _warn_without_lock(folder: epath.Path, reason: str | None) -> None:
    warnings.warn(
        f"{folder} cannot be locked ({reason}): make sure that no other process samples the same"
        " videos",
        stacklevel=1,
    )


class Busy(OSError):
    """Another process works on this run."""


def check_folder(folder: epath.Path) -> None:
    """Make a folder for a run. Raises ValueError if it holds other files under the names that a run
    needs, OSError if it cannot be written."""
    on_primary(_check_folder, folder)


def _check_folder(folder: epath.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not is_remote(folder):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise OSError(f"output folder {folder} cannot be written ({error})") from error
    names = (*FILES, "video.mp4", "video.gif", "preview.png")
    others = [name for name in names if name and _holds(folder / name)]
    # The record is checked last: another process may start a run here at this moment.
    if others and not (folder / RECORD).exists():
        raise ValueError(
            f"output folder {folder} has a {others[0]} that belongs to no run; choose another"
            " --output"
        )


def _holds(path: epath.Path) -> bool:
    """Return whether a path is a file, or a folder that is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists()
