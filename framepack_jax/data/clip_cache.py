"""Encoded clips by video, cached beside a dataset, so that nothing is encoded twice.

clips/ID.json      clips of a video or the reason of its rejection, written last
clips/ID/000.rec   record of a clip; 000.png is a thumbnail of it
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from framepack_jax.data import records, scenes
from framepack_jax.data.records import Clip, DatasetError, Record
from framepack_jax.data.rejected import Rejected
from framepack_jax.utils.files import atomic_write

STORE = "clips"
THUMBNAIL = 160


@dataclasses.dataclass(frozen=True)
class CachedVideo:
    """A video to prepare, or the seconds of it from `start` to `end`.

    `source` is its name in the listing, relative to the folder of the listing if it lies there;
    `id` its name in the cache, derived from `source`; `path` its present place. Each clip is stored
    once per caption. `stamp` is the size of the file in bytes and its modification time in ns,
    which identify the video together with its name.
    """

    id: str
    source: str
    path: Path
    captions: tuple[str, ...]
    stamp: tuple[int, int] = (0, 0)
    start: float = 0.0
    end: float = math.inf


class EncodedClip(NamedTuple):
    """The records of a clip, one for each caption, and one of its frames (H, W, 3) uint8."""

    records: list[Record]
    picture: np.ndarray


def video_id(source: str, start: float = 0.0, end: float = math.inf) -> str:
    """Return a readable, unique file name for a source, or for a span of it in seconds. The part
    before @ is the name of the whole video."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source).stem)[:40]
    name = f"{stem}-{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    if not start and end == math.inf:
        return name
    return f"{name}@{1000 * start:.0f}-{'end' if end == math.inf else f'{1000 * end:.0f}'}"


def is_done(folder: epath.PathLike, video: CachedVideo, made: Mapping[str, Any]) -> bool:
    """Return True if a video is completely cached in its present state and with these settings."""
    marker = _read_marker(folder, video.id)
    if marker is None or marker["key"] != _key(video, made):
        return False
    files = [record_file(folder, Clip(**clip)) for clip in marker["clips"]]
    root = epath.Path(folder) / STORE / video.id
    there = {file.name for file in root.iterdir()} if files and root.exists() else set()
    return all({file.name, file.with_suffix(".png").name} <= there for file in files)


def add(
    folder: epath.PathLike,
    video: CachedVideo,
    encoded: Iterator[EncodedClip],
    made: Mapping[str, Any],
    advance: Callable[[], Any] = lambda: None,
) -> None:
    """Write the clips of a video into the cache, or record why the video is rejected. Raises
    OSError if the cache cannot be written."""
    root = epath.Path(folder) / STORE / video.id
    # The marker of complete clips goes first: with other settings these are other clips.
    _marker_file(folder, video.id).unlink(missing_ok=True)
    root.rmtree(missing_ok=True)
    root.mkdir(parents=True)
    clips: list[dict[str, Any]] = []
    rejected: dict[str, str] | None = None
    try:
        for found, picture in encoded:
            for record in found:
                file = record_file(folder, record.clip)
                with atomic_write(file) as partial:
                    partial.write_bytes(records.pack(record))
                _thumbnail(file.with_suffix(".png"), picture)
                clips.append(dataclasses.asdict(record.clip))
            advance()
        if not clips:
            least = made.get("chunk_frames") or scenes.MIN_FRAMES
            raise Rejected("too_short", f"{video.path} has no scene of {least} frames")
    except Rejected as error:
        # Name the video as listed: it may have moved when this is read.
        detail = error.detail.replace(str(video.path), video.source)
        clips, rejected = [], {"reason": error.reason, "detail": detail}
    marker = {"key": _key(video, made), "source": video.source, "clips": clips}
    text = json.dumps(marker | {"rejected": rejected}, indent=1, sort_keys=True)
    with atomic_write(_marker_file(folder, video.id)) as partial:
        partial.write_text(text)


def clips_of(
    folder: epath.PathLike, video: CachedVideo
) -> tuple[list[Clip], dict[str, str] | None]:
    """Return (clips, rejection) of a cached video. Raises DatasetError if it is not cached."""
    marker = _read_marker(folder, video.id)
    if marker is None:
        raise DatasetError(f"{video.source} is not prepared yet; run framepack prepare again")
    return [Clip(**clip) for clip in marker["clips"]], marker["rejected"]


def record_file(folder: epath.PathLike, clip: Clip) -> epath.Path:
    """Return the file of the record of a clip; its thumbnail has the suffix .png."""
    number = clip.id.rpartition("-")[2]
    return epath.Path(folder) / STORE / clip.entry / f"{number}.rec"


def _key(video: CachedVideo, made: Mapping[str, Any]) -> str:
    """Hash all that determines the clips of a video."""
    captions = video.captions[0] if len(video.captions) == 1 else video.captions
    of = [video.source, video.stamp, captions, made]
    text = json.dumps(of, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _marker_file(folder: epath.PathLike, name: str) -> epath.Path:
    return epath.Path(folder) / STORE / f"{name}.json"


def _read_marker(folder: epath.PathLike, name: str) -> dict[str, Any] | None:
    try:
        return json.loads(_marker_file(folder, name).read_text())
    except (OSError, ValueError):
        return None


def _thumbnail(path: epath.Path, frame: np.ndarray) -> None:
    picture = Image.fromarray(frame)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG")
