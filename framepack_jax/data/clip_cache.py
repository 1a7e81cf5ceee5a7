"""Encoded clips by video, kept beside a dataset: what is there is not encoded again, and other
thresholds only pack anew.

    clips/ID.json      what became of a video, written last
    clips/ID/000.rec   records, 000.png a picture of each
"""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from framepack_jax.data import records, scenes
from framepack_jax.data.records import Clip, DatasetError, Record
from framepack_jax.data.rejected import Rejected
from framepack_jax.data.scenes import SceneClip, SceneSettings
from framepack_jax.utils.files import atomic_write

STORE = "clips"
THUMBNAIL = 160


@dataclasses.dataclass(frozen=True)
class CachedVideo:
    """A video to be prepared, or the seconds of it from `start` to `end`.

    `source` is its name in the listing, relative to the listing's folder if it lies there, `id` its
    name in the store, made of that, `path` where it lies now. Each clip is stored once for each of
    the captions. `stamp` is the bytes of the file and the time of its change in ns: with the name
    they tell it from all others, wherever it lies.
    """

    id: str
    source: str
    path: Path
    captions: tuple[str, ...]
    stamp: tuple[int, int] = (0, 0)
    start: float = 0.0
    end: float = math.inf


def video_id(source: str, start: float = 0.0, end: float = math.inf) -> str:
    """A file name for a source, or a span of it in seconds: readable, and different for different
    ones. The part before @ is that of the whole video."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source).stem)[:40]
    name = f"{stem}-{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    if not start and end == math.inf:
        return name
    return f"{name}@{1000 * start:.0f}-{'end' if end == math.inf else f'{1000 * end:.0f}'}"


def is_done(folder: Path, video: CachedVideo, made: Mapping[str, Any]) -> bool:
    """Whether a video is in the store as it is now, whole, and was encoded with these settings."""
    marker = _read_marker(folder, video.id)
    if marker is None or marker["key"] != _key(video, made):
        return False
    files = [record_file(folder, Clip(**clip)) for clip in marker["clips"]]
    return all(file.exists() and file.with_suffix(".png").exists() for file in files)


def add(
    folder: Path,
    video: CachedVideo,
    cuts: Iterator[SceneClip],
    encode: Callable[[Sequence[Clip], np.ndarray], Iterable[Record]],
    settings: SceneSettings,
    made: Mapping[str, Any],
    advance: Callable[[], Any] = lambda: None,
) -> None:
    """Encode the clips of a video into the store; what is wrong with a video is kept there too.
    Raises OSError where it cannot be written."""
    root = Path(folder) / STORE / video.id
    # First what says that these clips are whole: with other settings they are other clips.
    _marker_file(folder, video.id).unlink(missing_ok=True)
    if root.exists():
        shutil.rmtree(root)
    root.mkdir(parents=True)
    clips: list[dict[str, Any]] = []
    rejected: dict[str, str] | None = None
    try:
        for cut in cuts:
            described = _describe(video, cut, len(clips), settings)
            for record in encode(described, cut.frames):
                file = record_file(folder, record.clip)
                with atomic_write(file) as partial:
                    partial.write_bytes(records.pack(record))
                _thumbnail(file.with_suffix(".png"), cut.frames[len(cut.frames) // 2])
                clips.append(dataclasses.asdict(record.clip))
            advance()
        if not clips:
            raise Rejected("too_short", f"{video.path} has no scene of {scenes.MIN_FRAMES} frames")
    except Rejected as error:
        # By its name too: where it lies may be another place when this is read.
        detail = error.detail.replace(str(video.path), video.source)
        clips, rejected = [], {"reason": error.reason, "detail": detail}
    marker = {"key": _key(video, made), "source": video.source, "clips": clips}
    text = json.dumps(marker | {"rejected": rejected}, indent=1, sort_keys=True)
    with atomic_write(_marker_file(folder, video.id)) as partial:
        partial.write_text(text)


def _describe(
    video: CachedVideo, cut: SceneClip, number: int, settings: SceneSettings
) -> list[Clip]:
    """The clips of a cut, one a caption, numbered from `number` on."""
    count, height, width, _ = cut.frames.shape
    return [
        Clip(
            f"{video.id}-{n:03d}", video.source, cut.first / settings.fps, count, height, width,
            caption, cut.scores,
        )
        for n, caption in enumerate(video.captions, number)
    ]  # fmt: skip


def clips_of(folder: Path, video: CachedVideo) -> tuple[list[Clip], dict[str, str] | None]:
    """(clips, why there are none) of a video in the store. Raises DatasetError."""
    marker = _read_marker(folder, video.id)
    if marker is None:
        raise DatasetError(f"{video.source} is not prepared yet; run framepack prepare again")
    return [Clip(**clip) for clip in marker["clips"]], marker["rejected"]


def record_file(folder: Path, clip: Clip) -> Path:
    """Where the record of a clip lies; its picture has the suffix .png."""
    number = clip.id.rpartition("-")[2]
    return Path(folder) / STORE / clip.entry / f"{number}.rec"


def _key(video: CachedVideo, made: Mapping[str, Any]) -> str:
    """All that decides what becomes of a video."""
    captions = video.captions[0] if len(video.captions) == 1 else video.captions
    of = [video.source, video.stamp, captions, made]
    text = json.dumps(of, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _marker_file(folder: Path, name: str) -> Path:
    return Path(folder) / STORE / f"{name}.json"


def _read_marker(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        return json.loads(_marker_file(folder, name).read_text())
    except (OSError, ValueError):
        return None


def _thumbnail(path: Path, frame: np.ndarray) -> None:
    picture = Image.fromarray(frame)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG")
