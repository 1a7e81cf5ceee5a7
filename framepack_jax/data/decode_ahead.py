"""Decode several videos at a time, each in its own thread."""

import collections
from collections.abc import Generator, Iterable, Iterator

from framepack_jax.data import scenes
from framepack_jax.data.clip_cache import CachedVideo
from framepack_jax.data.scenes import SceneClip, SceneSettings
from framepack_jax.utils.prefetch import Prefetched, prefetch

# Clips of a video that are decoded before they are used.
CLIPS_AHEAD = 2


def decode_videos(
    videos: Iterable[CachedVideo], settings: SceneSettings, workers: int
) -> Generator[tuple[CachedVideo, Iterator[SceneClip]], None, None]:
    """Yield (video, its clips) in order, decoding `workers` videos at a time. The error of a video
    is raised among its clips."""
    ahead: collections.deque[tuple[CachedVideo, Prefetched[SceneClip]]] = collections.deque()
    try:
        for video in videos:
            clips = scenes.clips(video.path, settings, video.start, video.end)
            ahead.append((video, prefetch(clips, CLIPS_AHEAD)))
            if len(ahead) == workers:
                yield ahead[0]
                ahead.popleft()[1].close()
        while ahead:
            yield ahead[0]
            ahead.popleft()[1].close()
    finally:
        for _, decoding in ahead:
            decoding.close()
