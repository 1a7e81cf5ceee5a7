"""Clips encoded on several devices."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from framepack_jax.data.clip_cache import CachedVideo
from framepack_jax.data.encode_ahead import EncoderPool, encode_videos
from framepack_jax.data.records import Clip, Record
from framepack_jax.data.rejected import Rejected
from framepack_jax.data.scenes import SceneClip
from tests.fixtures.preparing import SETTINGS

# Clips of each video; two of the second before its error.
CLIPS = (1, 2, 3, 0, 1)


class Device:
    """An encoder that waits until `together` work, or for a time that differs by clip."""

    def __init__(self, together: threading.Barrier | None = None) -> None:
        self.together, self.working = together, threading.Lock()

    def records(self, clips: Sequence[Clip], frames: np.ndarray) -> list[Record]:
        assert self.working.acquire(blocking=False), "two threads use one encoder"
        if self.together is None:
            time.sleep(0.002 * (7 * int(frames[0, 0, 0, 0]) % 5))
        else:
            self.together.wait(10)
        self.working.release()
        return [Record(clip, frames[0, 0], frames[0, 0, 0], frames[0, 0], None) for clip in clips]


def decoded() -> Iterator[tuple[CachedVideo, Iterator[SceneClip]]]:
    def cuts(number: int) -> Iterator[SceneClip]:
        for clip in range(CLIPS[number]):
            level = 10 * number + clip
            yield SceneClip(30 * clip, np.full((5, 32, 48, 3), level, np.uint8), {"motion": 0.1})
        if number == 1:
            raise Rejected("damaged", "its end is missing")

    for number in range(len(CLIPS)):
        captions = ("a", "b") if number == 2 else ("a",)
        yield (
            CachedVideo(f"v{number}", f"{number}.mp4", Path(f"{number}.mp4"), captions),
            cuts(number),
        )


@pytest.mark.parametrize("devices", [1, 3])
def test_clips_come_in_order_from_any_number_of_devices(devices) -> None:
    """Each with a picture; the error of a video after its clips; captions as clips of their own."""
    pool = EncoderPool([Device() for _ in range(devices)])
    found = []
    for video, clips in encode_videos(decoded(), pool, SETTINGS):
        found.append((video.id, []))
        try:
            for records, picture in clips:
                assert (picture == records[0].text[0, 0]).all() and picture.shape == (32, 48, 3)
                found[-1][1].extend((r.clip.id, r.clip.caption, r.clip.start) for r in records)
        except Rejected as error:
            found[-1][1].append(error.reason)
    assert found == [
        ("v0", [("v0-000", "a", 0.0)]),
        ("v1", [("v1-000", "a", 0.0), ("v1-001", "a", 1.0), "damaged"]),
        ("v2", [(f"v2-{2 * n + i:03d}", "ab"[i], float(n)) for n in range(3) for i in range(2)]),
        ("v3", []),
        ("v4", [("v4-000", "a", 0.0)]),
    ]
    assert sum(pool.encoded) == sum(CLIPS) and min(pool.encoded) >= 1


def test_all_devices_encode_at_the_same_time() -> None:
    """Clips of different videos: three wait for each other."""
    together = threading.Barrier(3)
    pool = EncoderPool([Device(together) for _ in range(3)])
    videos = ((v, c) for v, c in decoded() if v.id != "v4")
    clips = [clip for _, found in encode_videos(videos, pool, SETTINGS) for clip in kept(found)]
    assert len(clips) == 6 and pool.encoded == [2, 2, 2]


def kept(clips: Iterator) -> Iterator:
    """The clips before an error."""
    try:
        yield from clips
    except Rejected:
        return


def test_an_error_of_an_encoder_ends_all() -> None:
    class Broken(Device):
        def records(self, clips, frames):
            if clips[0].id == "v1-001":
                raise RuntimeError("out of memory")
            return super().records(clips, frames)

    seen = []
    with pytest.raises(RuntimeError, match="out of memory"):
        for video, clips in encode_videos(decoded(), EncoderPool([Broken(), Broken()]), SETTINGS):
            seen += [(video.id, len(records)) for records, _ in clips]
    assert seen == [("v0", 1)]
