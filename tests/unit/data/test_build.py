"""Judgement of cached clips, and the summary of a prepared dataset."""

import contextlib
import json

import numpy as np

from framepack_jax.data import clip_cache
from framepack_jax.data.build import Judged, Packed
from framepack_jax.data.clip_cache import EncodedClip
from framepack_jax.data.filters import Thresholds
from framepack_jax.data.listing import list_videos
from framepack_jax.data.records import Clip, Index, Record

FRAME = np.zeros((32, 48, 3), np.uint8)
GOOD = {
    "motion": 1.0, "sharpness": 9.0, "brightness": 99.0, "black_bars": 0.0, "still": 0.0,
    "hash": 7.0,
}  # fmt: skip


def test_clips_are_judged_by_their_scores_and_those_before(tmp_path) -> None:
    """A dark one, one that is accepted, and one that looks like that."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.mp4").write_bytes(b"video")
        (tmp_path / f"{name}.txt").write_text("waves")
    listing, encoded = list_videos(tmp_path), np.zeros((2, 4), np.float32)
    for video in listing:
        scores = GOOD | {"brightness": 1.0} if video.source == "a.mp4" else GOOD
        clip = Clip(f"{video.id}-000", video.source, 0.0, 61, 32, 48, "waves", scores)
        record = Record(clip, encoded, encoded[0], encoded, np.zeros((16, 4, 6, 16)))
        clip_cache.add(tmp_path, video, iter([EncodedClip([record], FRAME)]), {})
    index = Index("latents", (), {}, 30.0, 4, 8, 16)
    with contextlib.closing(Judged(tmp_path, index)) as judged:
        (accepted,) = judged.judge(listing, Thresholds(), lambda video: None)
        rejected = [json.loads(line) for line in judged.rejected()]
        packed = judged.packed(listing)
    assert accepted.source == "b.mp4"
    assert [(row["source"], row["reason"]) for row in rejected] == [
        ("a.mp4", "dark"), ("c.mp4", "duplicate"),
    ]  # fmt: skip
    assert (packed.clips, packed.seconds, packed.buckets) == (1, 61 / 30, {(32, 48): 1})
    assert packed.rejected == {"dark": 1, "duplicate": 1}


def test_a_summary_names_clips_rejections_and_devices() -> None:
    packed = Packed(
        5, 90.0, {(64, 96): 2, (96, 64): 3}, {"still": 1, "short": 2}, cut_captions=4,
        left_out={".txt": 2}, encoded=(3, 2), text_tokens=77,
    )  # fmt: skip
    lines = str(packed).splitlines()
    assert lines[0].split() == ["encoded", "5", "clips", "on", "2", "devices:", "3,", "2"]
    assert lines[1].split() == ["accepted", "5", "clips,", "1.5", "minutes"]
    assert [line.split() for line in lines[2:4]] == [["64", "x", "96", "2"], ["96", "x", "64", "3"]]
    assert [line.split() for line in lines[4:7]] == [
        ["rejected", "3"],
        ["still", "1"],
        ["short", "2"],
    ]
    assert lines[7].startswith("captions cut: 4, after 77 tokens") and ".txt" in lines[8]
    assert len(lines) == 9


def test_one_device_is_not_named() -> None:
    assert str(Packed(1, 6.0, {}, {}, encoded=(1,))).split() == (
        ["accepted", "1", "clips,", "0.1", "minutes", "rejected", "0"]
    )
