"""Random short clips of a folder of videos, to train a VAE.

Video, start and crop of clip e of the endless stream do not depend on the number of threads and
hosts.

Shapes: B batch, T frames, H W rows and columns.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from framepack_jax.data.probe import probe
from framepack_jax.data.rejected import SUFFIXES
from framepack_jax.data.stream import BatchStream
from framepack_jax.utils.messages import shorten
from framepack_jax.video import count_frames, read_span

FPS = 30.0
# Maximum size of all videos for decoding them once and keeping them in memory.
KEPT_BYTES = 6 << 30


class ListedVideo(NamedTuple):
    """A video file: its path, its name below the folder, the number of its frames at 30 frames per
    second, and its size as shown."""

    path: Path
    name: str
    frames: int
    height: int
    width: int


def find_videos(folder: str | Path, frames: int, size: tuple[int, int]) -> list[ListedVideo]:
    """List the videos below a folder, by name.

    Raises ValueError if there are none, or if some are unreadable, shorter than `frames` or smaller
    than `size` (height, width). The error names all such videos.
    """
    folder = Path(folder)
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and not f.is_dir())
    if not files:
        raise ValueError(
            f"{folder} has no videos ({', '.join(SUFFIXES)}); framepack synthetic makes some"
        )
    found: list[ListedVideo] = []
    faults: list[str] = []
    for file in files:
        try:
            found.append(_look_at(file, folder, frames, size))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(
            f"{len(faults)} of the {len(files)} videos in {folder} do not give clips of {frames}"
            f" frames of {size[0]}x{size[1]}: {shorten(faults, separator='; ')}. Move them away, or"
            " ask for less with --frames or --size"
        )
    return found


def _look_at(file: Path, folder: Path, frames: int, size: tuple[int, int]) -> ListedVideo:
    """Probe a video. Raises ValueError if clips of `frames` frames of `size` cannot be cut from
    it."""
    shown, name = probe(file), file.relative_to(folder).as_posix()
    count = count_frames(file, FPS)
    if count < frames or shown.height < size[0] or shown.width < size[1]:
        raise ValueError(
            f"{file} has {count} frames of {shown.height}x{shown.width} at {FPS:g} a second"
        )
    return ListedVideo(file, name, count, shown.height, shown.width)


def hold_out(
    videos: Sequence[ListedVideo], count: int
) -> tuple[list[ListedVideo], list[ListedVideo]]:
    """Divide videos into (training, `count` held out) by the digests of their names, so that a
    growing folder keeps most of them. Raises ValueError if no video is left to train on."""
    if count >= len(videos):
        most = len(videos) - 1
        raise ValueError(
            f"--holdout {count} leaves none of {len(videos)} videos to train on; give --holdout"
            f" {most}{' or less' if most else ''}"
        )
    ranked = sorted(videos, key=lambda v: hashlib.sha256(v.name.encode()).hexdigest())
    held = set(ranked[:count])
    return [video for video in videos if video not in held], ranked[:count]


def read_clip(video: ListedVideo, first: int, frames: int) -> np.ndarray:
    """Read frames (T, H, W, 3) uint8 from `first` on, in the size of the video."""
    return read_span(video.path, FPS, first, frames, (video.height, video.width))


@functools.cache
def _whole(video: ListedVideo) -> np.ndarray:
    """Return all frames of a video, kept in memory."""
    return read_clip(video, 0, video.frames)


class Clips:
    """Endless batches (B, T, H, W, 3) uint8. This host reads its `share` (index, count)."""

    def __init__(
        self,
        videos: Sequence[ListedVideo],
        frames: int,
        size: tuple[int, int],
        batch: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.frames, self.size = frames, size
        self.kept = sum(3 * v.frames * v.height * v.width for v in videos) <= KEPT_BYTES
        stream = grain.MapDataset.source(list(videos)).seed(seed).shuffle().repeat()
        clips = stream.random_map(self._cut)
        self._iterator = BatchStream(clips, batch, share, threads=2, ahead=2 * batch)

    def _cut(self, video: ListedVideo, rng: np.random.Generator) -> np.ndarray:
        height, width = self.size
        first = int(rng.integers(video.frames - self.frames + 1))
        top = int(rng.integers(video.height - height + 1))
        left = int(rng.integers(video.width - width + 1))
        if self.kept:
            clip = _whole(video)[first : first + self.frames]
        else:
            clip = read_clip(video, first, self.frames)
        return clip[:, top : top + height, left : left + width]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Return the position of the stream, the same on every host."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Move the stream to a position."""
        self._iterator.set_state(state)
