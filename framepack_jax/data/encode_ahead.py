"""Encode several clips at a time, each on a device of its own."""

import contextlib
import itertools
import queue
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from framepack_jax.data.clip_cache import CachedVideo, EncodedClip
from framepack_jax.data.records import Clip, Record
from framepack_jax.data.rejected import Rejected
from framepack_jax.data.scenes import SceneClip, SceneSettings
from framepack_jax.utils.prefetch import map_ahead

# Clips and ends of videos for each device that are encoded, wait for it, or wait for earlier ones.
AHEAD = 3


class ClipEncoder(Protocol):
    """See `precompute.Encoder`."""

    def records(self, clips: Sequence[Clip], frames: np.ndarray) -> Iterable[Record]: ...


class EncoderPool:
    """Encoders of several devices, each used by one thread at a time. `encoded` counts the clips of
    each."""

    def __init__(self, encoders: Sequence[ClipEncoder]) -> None:
        self.encoders = encoders
        self.encoded = [0] * len(encoders)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(encoders)):
            self._free.put(number)

    def encode(self, job: "_Job") -> list[Record]:
        """Encode a clip with an encoder that is free."""
        if job.frames is None:
            return []
        number = self._free.get()
        try:
            self.encoded[number] += 1
            return list(self.encoders[number].records(job.clips, job.frames))
        finally:
            self._free.put(number)


class _Job(NamedTuple):
    """A clip to encode, described once for each caption; without frames, the end of a video.
    `rejected` is why the video is rejected. `number` is that of the video."""

    number: int
    video: CachedVideo
    clips: list[Clip]
    frames: np.ndarray | None
    rejected: Rejected | None = None


def encode_videos(
    decoded: Iterable[tuple[CachedVideo, Iterator[SceneClip]]],
    pool: EncoderPool,
    settings: SceneSettings,
) -> Generator[tuple[CachedVideo, Iterator[EncodedClip]], None, None]:
    """Yield (video, its encoded clips) in order. Clips of the same and of following videos are
    encoded meanwhile. The error of a video is raised among its clips."""
    devices = len(pool.encoders)
    found = map_ahead(pool.encode, _jobs(decoded, settings), devices, AHEAD * devices)
    with contextlib.closing(found):
        for (_, video), group in itertools.groupby(found, key=lambda pair: pair[0][:2]):
            yield video, _encoded(group)


def _jobs(
    decoded: Iterable[tuple[CachedVideo, Iterator[SceneClip]]], settings: SceneSettings
) -> Iterator[_Job]:
    for number, (video, cuts) in enumerate(decoded):
        rejected, count = None, 0
        try:
            for cut in cuts:
                clips = _describe(video, cut, count, settings)
                count += len(clips)
                yield _Job(number, video, clips, cut.frames)
        except Rejected as error:
            rejected = error
        yield _Job(number, video, [], None, rejected)


def _describe(
    video: CachedVideo, cut: SceneClip, number: int, settings: SceneSettings
) -> list[Clip]:
    """Return the clips of a scene, one per caption, numbered from `number` on."""
    count, height, width, _ = cut.frames.shape
    return [
        Clip(
            f"{video.id}-{n:03d}", video.source, cut.first / settings.fps, count, height, width,
            caption, cut.scores,
        )
        for n, caption in enumerate(video.captions, number)
    ]  # fmt: skip


def _encoded(found: Iterator[tuple[_Job, list[Record]]]) -> Iterator[EncodedClip]:
    for job, records in found:
        if job.rejected is not None:
            raise job.rejected
        if job.frames is not None:
            yield EncodedClip(records, job.frames[len(job.frames) // 2])
