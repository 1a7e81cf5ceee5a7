"""A run folder: all that one video needs to be gone on with, decoded again, or made again.

    run.json                        flags, seed, schedule and order, hashes, versions, timings
    run.lock                        empty; locked by the process that makes the run
    inputs/                         its pictures as they are used, and the end of extended footage
    latents/known.npz               latents given: start image, end image (as a guide: at the
                                    position that follows the video), key frames, footage
    latents/section_000.npz         latents of a section, written before they are decoded
    segments/frames_00000000.mp4    frames that are final, from that number on, each encoded once
    video.mp4                       the segments from the first that touch each other, copied
    preview.png                     the section being made; at the end, a contact sheet
    video.gif                       where it is wanted

Every file appears whole or not at all, so that a run can be stopped anywhere. In an .npz file of
latents are `positions` (F,) and `latents` (F, H, W, C) float32, normalised. Of several processes
the first has the folder; the others see what it has read and written.
"""

import contextlib
import fcntl
import functools
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from PIL import Image

from framepack_jax import video
from framepack_jax.generation.request import Request, SourceVideo
from framepack_jax.packing import Section
from framepack_jax.parallel.multihost import is_primary, on_primary
from framepack_jax.utils.files import atomic_write

P = ParamSpec("P")
T = TypeVar("T")
FORMAT = 2
# New names of the flags in records of earlier formats.
RENAMED_FLAGS = {
    1: {"guidance": "distilled_guidance", "cfg": "cfg_scale", "threshold": "cache_threshold"}
}
# What `memory` was in records of format 1.
OFFLOAD = {"auto": "auto", "high": "none", "low": "full"}
RECORD = "run.json"
LOCK = "run.lock"
LATENTS = ("positions", "latents")
NEEDED = (
    "status",
    "flags",
    "bundle",
    "weights",
    "sections",
    "height",
    "width",
    "spans",
    "batch",
    "timings",
)
# All that a run writes besides its record; in its folders nothing else is ever removed.
FILES = {
    "": ("video.mp4", "video.gif", "preview.png", "*.part"),
    "inputs": ("image.png", "end_image.png", "key_frame_*.png", "footage.npz", "*.part"),
    "latents": ("known.npz", "section_*.npz", "*.part"),
    "segments": ("frames_*.mp4", "*.part"),
}


def _by_primary(
    method: Callable[Concatenate["RunDir", P], T],
) -> Callable[Concatenate["RunDir", P], T]:
    """A method that works on files: called in the first process, its result and the record are
    those of all."""

    @functools.wraps(method)
    def call(self: "RunDir", *args: P.args, **kwargs: P.kwargs) -> T:
        def work() -> tuple[T, dict[str, Any]]:
            return method(self, *args, **kwargs), self.record

        result, self.record = on_primary(work)
        return result

    return call


class RunDir:
    """A run folder and its record, which is what `run.json` holds."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self.record = record
        self._lock: int | None = None

    @classmethod
    def open(cls, folder: Path) -> "RunDir":
        """Read the record. Raises ValueError where there is none, or none that can be read."""
        return cls(folder, on_primary(cls._read_record, folder))

    @staticmethod
    def _read_record(folder: Path) -> dict[str, Any]:
        try:
            record = json.loads((folder / RECORD).read_text())
            if record["format"] not in (*RENAMED_FLAGS, FORMAT):
                raise ValueError(f"its format is {record['format']}, expected {FORMAT}")
            if missing := [name for name in NEEDED if name not in record]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            names = RENAMED_FLAGS.get(record["format"], {})
            flags = {names.get(name, name): value for name, value in record["flags"].items()}
            if "memory" in record:
                record["offload"] = OFFLOAD[record.pop("memory")]
            record |= {"format": FORMAT, "flags": flags}
            # Runs from before there was this flag.
            flags.setdefault("end_image_as", "still" if flags.get("end_image") else "auto")
            return record
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{folder} holds no run: it has no {RECORD}; give the --output folder of one"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"run {folder}: {RECORD} cannot be read ({error}); put back a copy of it, or make"
                " the video again with --overwrite"
            ) from error

    @classmethod
    @contextlib.contextmanager
    def locked(cls, folder: Path) -> Iterator["RunDir"]:
        """Open and lock a run, so that its record is the last word. Raises Busy, ValueError."""
        run = cls.open(folder)
        run.lock()
        try:
            run.record = on_primary(cls._read_record, folder)
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
        """Make the folder, or take an earlier run out of it; keep the prepared request and the
        given latents (H, W, C) by position. `beginning` are the frames of footage that no section
        changes, if any, of which the record has the number. Until all is there the record says
        "beginning": such a run has nothing to go on with."""
        check_folder(self.folder)
        self.lock()
        self.write_record(status="beginning")
        for name, patterns in FILES.items():
            (self.folder / name).mkdir(exist_ok=True)
            for file in (f for pattern in patterns for f in (self.folder / name).glob(pattern)):
                file.unlink()
        for name, image in _pictures(request).items():
            video.save_png(self.folder / "inputs" / f"{name}.png", image)
        if request.footage is not None:
            frames = request.footage.frames
            last = request.footage.last[self.record["beginning"] - frames :]
            _save(self.folder / "inputs" / "footage.npz", {"frames": frames, "last": last})
        self.save_known(known)
        if beginning is not None:
            self._write_segment(0, beginning)
        self.write_record(status="begun")

    @_by_primary
    def lock(self) -> None:
        """Keep others from making the same run until `unlock` or the end of this process, however
        it ends. Raises Busy if another process has it. Warns where files cannot be locked."""
        if self._lock is not None:
            return
        try:
            # Opened for writing: on NFS nothing else can be locked.
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(f"run {self.folder} cannot be written ({error})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise Busy(f"{self.folder} is being made by another process") from None
        except OSError as error:
            warnings.warn(
                f"{self.folder} cannot be locked ({error.strerror}): see to it that no other"
                " process makes the same videos",
                stacklevel=1,
            )
        self._lock = lock

    def unlock(self) -> None:
        """Let others make this run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @_by_primary
    def write_record(self, **changes: Any) -> None:
        """Change the record and write it."""
        self.record |= changes
        self._write_record()

    def _write_record(self) -> None:
        text = json.dumps(self.record, indent=1, ensure_ascii=False)
        write_whole(self.folder / RECORD, text.encode())

    def note(self, status: str) -> None:
        """Write how a run ended, without word to the other processes, which may be gone; where the
        disk is full, nothing else is lost by it."""
        self.record["status"] = status
        if is_primary():
            with contextlib.suppress(OSError):
                self._write_record()

    @_by_primary
    def request(self) -> Request:
        """The prepared request that `begin` was given. Raises ValueError where files are gone."""
        flags, inputs = self.record["flags"], self.folder / "inputs"
        footage = None
        if flags["extend"] is not None:
            kept = _load(inputs / "footage.npz", "frames", "last")
            footage = SourceVideo(int(kept["frames"]), kept["last"][0], kept["last"])
        end = inputs / "end_image.png"
        return Request(
            prompt=flags["prompt"],
            image=_open_picture(inputs / "image.png"),
            negative_prompt=flags["negative_prompt"],
            seed=flags["seed"],
            end_image=_open_picture(end) if end.exists() else None,
            end_image_as=flags["end_image_as"],
            key_frames=tuple(
                (seconds, _open_picture(inputs / f"{_key_frame(i)}.png"))
                for i, seconds in enumerate(self.record["key_frames"])
            ),
            footage=footage,
        )

    # Latents

    @_by_primary
    def known(self) -> dict[int, np.ndarray]:
        """Given latents (H, W, C) by position. Raises DamagedFile, OSError."""
        arrays = _load(self.folder / "latents" / "known.npz", *LATENTS)
        return dict(zip(arrays["positions"].tolist(), arrays["latents"], strict=True))

    @_by_primary
    def save_known(self, known: Mapping[int, np.ndarray]) -> None:
        """Keep given latents (H, W, C) by position."""
        positions = np.asarray(list(known), int)
        arrays = {"positions": positions, "latents": np.stack(list(known.values()))}
        _save(self.folder / "latents" / "known.npz", arrays)

    @_by_primary
    def save_section(self, number: int, section: Section, latents: np.ndarray) -> None:
        """Keep the latents (w, H, W, C) of a section."""
        arrays = {"positions": np.asarray(section.targets), "latents": latents}
        _save(self._section_file(number), arrays)

    @_by_primary
    def has_sections(self) -> bool:
        """Whether any section is done."""
        return self.record["status"] != "beginning" and self._section_file(0).exists()

    @_by_primary
    def sections(self, plan: Sequence[Section], shape: tuple[int, ...]) -> list[np.ndarray]:
        """Latents (w, H, W, C) of the sections that are done, `shape` being (H, W, C).

        Raises DamagedFile, with `number` and the sections before, where a file cannot be used.
        """
        latents = []
        for number, section in enumerate(plan):
            file = self._section_file(number)
            if not file.exists():
                break
            try:
                arrays = _load(file, *LATENTS)
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
        """All latents (H, W, C) by position. Raises DamagedFile."""
        latents = {}
        for file in sorted((self.folder / "latents").glob("*.npz")):
            arrays = _load(file, *LATENTS)
            latents |= dict(zip(arrays["positions"].tolist(), arrays["latents"], strict=True))
        return latents

    def _section_file(self, number: int) -> Path:
        return self.folder / "latents" / f"section_{number:03d}.npz"

    # Frames

    @_by_primary
    def spans(self) -> int:
        """How many sections, from the first on, have all their frames in segments."""
        for number, (start, stop) in enumerate(self.record["spans"]):
            if stop == start:
                continue
            try:
                if video.mp4_info(self._segment(start)).frames != stop - start:
                    return number
            except ValueError:  # missing, or damaged
                return number
        return len(self.record["spans"])

    @_by_primary
    def add_span(self, number: int, start: int, frames: np.ndarray) -> None:
        """Encode the frames (P, height, width, 3) uint8 that became final with section `number`,
        and renew `video.mp4`."""
        if len(frames):
            self._write_segment(start, frames)
        spans = [*self.record["spans"][:number], [start, start + len(frames)]]
        self.write_record(spans=spans)
        self.join()

    @_by_primary
    def join(self) -> None:
        """`video.mp4` from the segments, from the first one on up to where one is missing."""
        spans = [(0, self.record["beginning"]), *map(tuple, self.record["spans"])]
        touching: list[tuple[int, int]] = []
        for start, stop in sorted(span for span in spans if span[1] > span[0]):
            if not self._segment(start).exists():
                continue
            if touching and start != touching[-1][1]:
                break
            touching.append((start, stop))
        if touching:
            segments = [self._segment(start) for start, _ in touching]
            video.join_mp4(self.folder / "video.mp4", segments)

    def _segment(self, start: int) -> Path:
        return self.folder / "segments" / f"frames_{start:08d}.mp4"

    def _write_segment(self, start: int, frames: Iterable[np.ndarray]) -> None:
        flags = self.record["flags"]
        video.write_mp4(self._segment(start), frames, fps=flags["fps"], crf=flags["crf"])


def check_free(folder: Path) -> None:
    """Raise Busy if another process makes the run in a folder."""
    run = RunDir(folder, {})
    run.lock()
    run.unlock()


class Busy(OSError):
    """Another process makes this run."""


def record_text(folder: Path) -> str | None:
    """The record of a run as it is written, None where there is none: another process has changed
    the run if this has changed."""

    def read() -> str | None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return (folder / RECORD).read_text()
        return None

    return on_primary(read)


def check_folder(folder: Path) -> None:
    """Make a folder for a run. Raises ValueError where it holds files of another kind under the
    names that a run needs, OSError where it cannot be written."""
    on_primary(_check_folder, folder)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"output folder {folder} cannot be written ({error})") from error
    names = (*FILES, "video.mp4", "video.gif", "preview.png")
    others = [name for name in names if name and _holds(folder / name)]
    # In this order: another process may begin a run there at this moment, with its record.
    if others and not (folder / RECORD).exists():
        raise ValueError(
            f"output folder {folder} has a {others[0]} that is no run's; choose another --output"
        )


def _holds(path: Path) -> bool:
    """Whether there is a file, or a folder with something in it."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


class DamagedFile(ValueError):
    """A file of latents that cannot be used; `done` are the sections before it."""

    done: Sequence[np.ndarray] = ()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there in full, also after a crash, or not at all."""
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


def _pictures(request: Request) -> dict[str, np.ndarray]:
    """The images of a prepared request by the names of their files."""
    pictures = {"image": request.image}
    if request.end_image is not None:
        pictures["end_image"] = request.end_image
    return pictures | {_key_frame(i): image for i, (_, image) in enumerate(request.key_frames)}


def _key_frame(number: int) -> str:
    return f"key_frame_{number:02d}"


def _open_picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); make the video again with --overwrite"
        ) from error


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def _load(path: Path, *names: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own
        raise DamagedFile(f"{path} is damaged ({error})") from error
