"""Videos decoded ahead, in threads and on a cluster."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from framepack_jax.data import clip_cache, decode_ahead, ray_backend, scenes
from framepack_jax.data.rejected import Rejected
from tests.fixtures.preparing import SETTINGS


def test_memory_does_not_grow_with_the_videos_that_wait(monkeypatch) -> None:
    """Only the videos that are decoded now are asked for, of a million."""
    asked = []

    def videos():
        for number in range(1_000_000):
            asked.append(number)
            yield clip_cache.CachedVideo(
                str(number), "", Path(f"/nowhere/{number}.mp4"), ("waves",)
            )

    found = decode_ahead.decode_videos(videos(), SETTINGS, 3)
    for number in range(5):
        one, cuts = next(found)
        assert one.id == str(number) and len(asked) <= number + 3
        with pytest.raises(Rejected, match="does not exist"):
            next(cuts)
    found.close()


def test_a_cluster_sends_clips_as_they_come(tmp_path, monkeypatch) -> None:
    """Not those of a whole video at once; what is wrong with its end comes after them."""
    given = []

    def clips(path, settings, start, end):
        for number in range(3):
            given.append(number)
            yield scenes.SceneClip(number, np.zeros((5, 2, 2, 3), np.uint8), {})
        raise Rejected("damaged", "its end is missing")

    monkeypatch.setattr(scenes, "clips", clips)
    row = {"number": 0, "path": "a.mp4", "start": 0.0, "end": math.inf}
    rows = ray_backend.clip_rows(row, dataclasses.asdict(SETTINGS))
    assert next(rows)["first"] == 0 and given == [0]
    assert [cut.first for cut in ray_backend.cuts(itertools.islice(rows, 2))] == [1, 2]
    with pytest.raises(Rejected, match="its end is missing"):
        list(ray_backend.cuts(rows))
