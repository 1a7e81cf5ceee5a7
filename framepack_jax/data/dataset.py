"""Stored clips become a dataset: thresholds, shards by bucket, tables of what got in or not."""

import collections
import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from framepack_jax import video as pictures
from framepack_jax.data import records, store
from framepack_jax.data.records import Clip, Index
from framepack_jax.data.stages import Thresholds
from framepack_jax.data.store import Video
from framepack_jax.video.files import whole

MANIFEST, REJECTED = "manifest.jsonl", "rejected.jsonl"
SHEET_CLIPS = 24


@dataclasses.dataclass(frozen=True)
class Packed:
    """What became of the videos: the clips that got in, and reasons with their numbers."""

    clips: int
    seconds: float
    buckets: dict[tuple[int, int], int]
    rejected: dict[str, int]

    def __str__(self) -> str:
        lines = [f"accepted  {self.clips} clips, {self.seconds / 60:.1f} minutes"]
        lines += [f"  {h:>5} x {w:<5} {count:>7}" for (h, w), count in self.buckets.items()]
        lines.append(f"rejected  {sum(self.rejected.values())}")
        lines += [f"  {reason:<14}{count:>7}" for reason, count in self.rejected.items()]
        return "\n".join(lines)


def pack(
    folder: Path, videos: Sequence[Video], thresholds: Thresholds, index: Index, empty: Any
) -> Packed:
    """Write shards, tables and contact sheets of the videos in the store, the index last. `index`
    says all but the shards, `empty` are the empty prompt's states. Raises OSError, DatasetError."""
    folder = Path(folder)
    (folder / records.INDEX).unlink(missing_ok=True)
    shutil.rmtree(folder / records.SHARDS, ignore_errors=True)
    accepted, rejected = _judge(folder, videos, thresholds, index.fps)
    _write_tables(folder, accepted, rejected)
    shards = []
    for bucket in sorted({(clip.height, clip.width) for clip in accepted}):
        mine = [clip for clip in accepted if (clip.height, clip.width) == bucket]
        shards += records.write_shards(folder, bucket, _stored(folder, mine, index))
    records.write_empty(folder, *empty)
    _write_sheets(folder, accepted, rejected, index.fps)
    records.write_index(folder, dataclasses.replace(index, shards=tuple(shards)))
    counts = collections.Counter((clip.height, clip.width) for clip in accepted)
    return Packed(
        clips=len(accepted),
        seconds=sum(clip.frames for clip in accepted) / index.fps,
        buckets=dict(sorted(counts.items())),
        rejected=dict(collections.Counter(r["reason"] for r, _ in rejected).most_common()),
    )


def _judge(
    folder: Path, videos: Sequence[Video], thresholds: Thresholds, fps: float
) -> tuple[list[Clip], list[tuple[dict[str, Any], Clip | None]]]:
    """(clips that get in, (reason, clip) of the others), in the order of names."""
    accepted: list[Clip] = []
    rejected: list[tuple[dict[str, Any], Clip | None]] = []
    seen: set[float] = set()
    for video in sorted(videos, key=lambda video: video.id):
        clips, problem = store.clips_of(folder, video)
        if problem is not None:
            rejected.append(({"source": video.source, **problem}, None))
        for clip in clips:
            reason = thresholds.judge(clip.frames / fps, clip.scores, seen)
            if reason is None:
                accepted.append(clip)
                seen.add(clip.scores["hash"])
            else:
                row = {"source": clip.source, "id": clip.id, "reason": reason}
                rejected.append((row | {"detail": _detail(clip, fps)}, clip))
    return accepted, rejected


def _detail(clip: Clip, fps: float) -> str:
    scores = ", ".join(f"{name} {value:g}" for name, value in clip.scores.items() if name != "hash")
    return f"{clip.frames / fps:.2f} s from {clip.start:.2f} s; {scores}"


def _stored(folder: Path, clips: Sequence[Clip], index: Index) -> Iterator[tuple[bytes, int]]:
    """(record, latent frames) of clips."""
    for clip in clips:
        length = 1 + (clip.frames - 1) // index.time_compression
        yield store.record_file(folder, clip).read_bytes(), length


def _write_tables(
    folder: Path, accepted: Sequence[Clip], rejected: Sequence[tuple[dict[str, Any], Clip | None]]
) -> None:
    rows = [dataclasses.asdict(clip) | {"accepted": True, "reason": None} for clip in accepted]
    rows += [
        dataclasses.asdict(clip) | {"accepted": False, "reason": row["reason"]}
        for row, clip in rejected
        if clip is not None
    ]
    rows.sort(key=lambda row: row["id"])
    for name, lines in ((MANIFEST, rows), (REJECTED, [row for row, _ in rejected])):
        with whole(folder / name) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_sheets(
    folder: Path,
    accepted: Sequence[Clip],
    rejected: Sequence[tuple[dict[str, Any], Clip | None]],
    fps: float,
) -> None:
    """Contact sheets, clips at even distances; none where there is nothing to show."""
    shown = [(clip, f"{clip.frames / fps:.1f} s  {clip.id}") for clip in accepted]
    refused = [(clip, f"{row['reason']}  {clip.id}") for row, clip in rejected if clip is not None]
    for name, clips in (("accepted.png", shown), ("rejected.png", refused)):
        (folder / name).unlink(missing_ok=True)
        if clips:
            picks = np.linspace(0, len(clips) - 1, min(SHEET_CLIPS, len(clips))).round().astype(int)
            cells = [_picture(folder, clips[pick][0]) for pick in picks]
            labels = [clips[pick][1] for pick in picks]
            pictures.save_png(folder / name, pictures.labelled_sheet(cells, labels))


def _picture(folder: Path, clip: Clip) -> np.ndarray:
    with Image.open(store.record_file(folder, clip).with_suffix(".png")) as image:
        return np.asarray(image.convert("RGB"))
