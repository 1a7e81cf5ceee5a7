"""Encoded clips by video, kept beside a dataset: what is there is not encoded again, and other
thresholds only pack anew.

    clips/ID.json      what became of a video, written last
    clips/ID/000.rec   records, 000.png a picture of each
"""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from framepack_jax.data import records, stages
from framepack_jax.data.records import Clip, DatasetError, Record
from framepack_jax.data.stages import Rejected, Settings

STORE = "clips"
THUMBNAIL = 160


@dataclasses.dataclass(frozen=True)
class Video:
    """A video to be prepared: `id` is its name in the store, made of `source`, its path as it is
    listed, relative to the folder of the dataset's source if it lies there."""

    id: str
    source: str
    path: Path
    caption: str | None


def video_id(source: str) -> str:
    """A file name for a source: readable, and different for different ones."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source).stem)[:40]
    return f"{stem}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def is_done(folder: Path, video: Video, made: Mapping[str, Any]) -> bool:
    """Whether a video is in the store as it is now, and was encoded with these settings."""
    marker = _read_marker(folder, video.id)
    return marker is not None and marker["key"] == _key(video, made)


def add(
    folder: Path,
    video: Video,
    cuts: Iterator[stages.Cut],
    encode: Callable[[Clip, np.ndarray], Record],
    settings: Settings,
    made: Mapping[str, Any],
    advance: Callable[[], Any] = lambda: None,
) -> None:
    """Encode the clips of a video into the store; what is wrong with a video is kept there too.
    Raises OSError where it cannot be written."""
    root = Path(folder) / STORE / video.id
    if root.exists():
        shutil.rmtree(root)
    root.mkdir(parents=True)
    clips, rejected = [], None
    try:
        if video.caption is None:
            raise Rejected(
                "no_caption",
                f"{video.path} has no caption; write one into {video.path.with_suffix('.txt').name}"
                " beside it or into the manifest, or give --empty-captions",
            )
        for number, cut in enumerate(cuts):
            frames = cut.frames
            clip = Clip(
                f"{video.id}-{number:03d}", video.source, cut.first / settings.fps, len(frames),
                *frames.shape[1:3], video.caption, cut.scores,
            )  # fmt: skip
            _write(root / f"{number:03d}.rec", records.pack(encode(clip, frames)))
            _thumbnail(root / f"{number:03d}.png", frames[len(frames) // 2])
            clips.append(dataclasses.asdict(clip))
            advance()
        if not clips:
            raise Rejected(
                "too_short", f"{video.path} has no scene of {stages.LEAST_FRAMES} frames"
            )
    except Rejected as error:
        clips, rejected = [], {"reason": error.reason, "detail": error.detail}
    marker = {"key": _key(video, made), "source": video.source, "clips": clips}
    text = json.dumps(marker | {"rejected": rejected}, indent=1, sort_keys=True)
    _write(Path(folder) / STORE / f"{video.id}.json", text.encode())


def clips_of(folder: Path, video: Video) -> tuple[list[Clip], dict[str, str] | None]:
    """(clips, why there are none) of a video in the store. Raises DatasetError."""
    marker = _read_marker(folder, video.id)
    if marker is None:
        raise DatasetError(f"{video.source} is not prepared yet; run framepack prepare again")
    return [Clip(**clip) for clip in marker["clips"]], marker["rejected"]


def record_file(folder: Path, clip: Clip) -> Path:
    """Where the record of a clip lies; its picture has the suffix .png."""
    video, _, number = clip.id.rpartition("-")
    return Path(folder) / STORE / video / f"{number}.rec"


def _key(video: Video, made: Mapping[str, Any]) -> str:
    """All that decides what becomes of a video."""
    try:
        stat = video.path.stat()
        there = [stat.st_size, stat.st_mtime_ns]
    except OSError:
        there = None
    text = json.dumps([video.source, there, video.caption, made], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_marker(folder: Path, name: str) -> dict[str, Any] | None:
    file = Path(folder) / STORE / f"{name}.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _thumbnail(path: Path, frame: np.ndarray) -> None:
    picture = Image.fromarray(frame)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(path, format="PNG")
