"""Stored clips become a dataset: thresholds, shards by bucket, tables of what got in or not.

It is written beside the one that is there, and takes its place when it is whole.
"""

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
from framepack_jax.data.records import Clip, DatasetError, Index
from framepack_jax.data.stages import Thresholds
from framepack_jax.data.store import Video
from framepack_jax.video.files import whole

MANIFEST, REJECTED = "manifest.jsonl", "rejected.jsonl"
# What videos the dataset is of: where they were listed, and their stamps by name.
VIDEOS = "videos.json"
SHEETS = ("accepted.png", "rejected.png")
SHEET_CLIPS = 24
# In the order in which they come; the index says that all are there.
PARTS = (records.SHARDS, records.EMPTY, VIDEOS, MANIFEST, REJECTED, *SHEETS, records.INDEX)


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


def check_videos(folder: Path, listing: Path, videos: Sequence[Video]) -> None:
    """Raise DatasetError where the dataset in a folder is of other videos: of another listing, none
    of whose videos is among these."""
    file = Path(folder) / VIDEOS
    if not file.exists():
        return
    try:
        there = json.loads(file.read_text())
        place, stamps = there["listing"], dict(there["videos"])
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{file}, which says what videos the dataset is of, is damaged ({error}); if they are"
            f" those of {listing}, give --replace"
        ) from error
    if place == str(Path(listing).resolve()):
        return
    if any(stamps.get(name) == stamp for name, stamp in _stamps(videos).items()):
        return
    raise DatasetError(
        f"--output {folder} is a dataset of the videos of {place}, and --videos {listing} has none"
        " of them; give another --output, or --replace for a dataset of these instead"
    )


def pack(
    folder: Path,
    listing: Path,
    videos: Sequence[Video],
    thresholds: Thresholds,
    index: Index,
    empty: Any,
) -> Packed:
    """Make a dataset of the videos in the store, which takes the place of the one that is there
    when it is whole. `listing` is where the videos are listed, `index` says all but the shards,
    `empty` are the empty prompt's states. Raises OSError, DatasetError."""
    folder = Path(folder)
    new = folder / records.NEW
    if new.exists():
        shutil.rmtree(new)
    new.mkdir()
    try:
        accepted, rejected = _judge(folder, videos, thresholds, index)
        _write_tables(new, accepted, rejected)
        _write_videos(new, listing, videos)
        shards = []
        for bucket in sorted({(clip.height, clip.width) for clip in accepted}):
            mine = [clip for clip in accepted if (clip.height, clip.width) == bucket]
            shards += records.write_shards(new, bucket, _stored(folder, mine, index))
        records.write_empty(new, *empty)
        _write_sheets(new, folder, accepted, rejected, index.fps)
        records.write_index(new, dataclasses.replace(index, shards=tuple(shards)))
        _swap(folder, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    counts = collections.Counter((clip.height, clip.width) for clip in accepted)
    return Packed(
        clips=len(accepted),
        seconds=sum(clip.frames for clip in accepted) / index.fps,
        buckets=dict(sorted(counts.items())),
        rejected=dict(collections.Counter(r["reason"] for r, _ in rejected).most_common()),
    )


def _swap(folder: Path, new: Path) -> None:
    """Put the parts of a dataset that lie in `new` in the place of those in `folder`. The index
    goes first and comes last: a folder where this was stopped is no dataset, until it is packed
    again."""
    old = new / "old"
    old.mkdir()
    for name in reversed(PARTS):
        if (folder / name).exists():
            (folder / name).rename(old / name)
    for name in PARTS:
        if (new / name).exists():
            (new / name).rename(folder / name)


def _judge(
    folder: Path, videos: Sequence[Video], thresholds: Thresholds, index: Index
) -> tuple[list[Clip], list[tuple[dict[str, Any], Clip | None]]]:
    """(clips that get in, (reason, clip) of the others), in the order of names."""
    accepted: list[Clip] = []
    rejected: list[tuple[dict[str, Any], Clip | None]] = []
    seen: set[float] = set()
    for video in sorted(videos, key=lambda video: video.id):
        clips, problem = store.clips_of(folder, video)
        if index.mode == "pixels":
            # Training reads them from where they are now.
            clips = [dataclasses.replace(clip, source=str(video.path)) for clip in clips]
        if problem is not None:
            rejected.append(({"source": video.source, **problem}, None))
        for clip in clips:
            reason = thresholds.judge(clip.frames / index.fps, clip.scores, seen)
            if reason is None:
                accepted.append(clip)
                seen.add(clip.scores["hash"])
            else:
                row = {"source": clip.source, "id": clip.id, "reason": reason}
                rejected.append((row | {"detail": _detail(clip, index.fps)}, clip))
    return accepted, rejected


def _detail(clip: Clip, fps: float) -> str:
    scores = ", ".join(f"{name} {value:g}" for name, value in clip.scores.items() if name != "hash")
    return f"{clip.frames / fps:.2f} s from {clip.start:.2f} s; {scores}"


def _stored(folder: Path, clips: Sequence[Clip], index: Index) -> Iterator[tuple[bytes, int]]:
    """(record, latent frames) of clips."""
    for clip in clips:
        data = store.record_file(folder, clip).read_bytes()
        if index.mode == "pixels":
            data = records.pack(records.unpack(data)._replace(clip=clip))
        yield data, 1 + (clip.frames - 1) // index.time_compression


def _stamps(videos: Sequence[Video]) -> dict[str, list[int]]:
    """By name, of those that are there."""
    stamps = {video.source: store.stamp(video) for video in videos}
    return {name: stamp for name, stamp in stamps.items() if stamp is not None}


def _write_videos(new: Path, listing: Path, videos: Sequence[Video]) -> None:
    text = json.dumps({"listing": str(Path(listing).resolve()), "videos": _stamps(videos)})
    with whole(new / VIDEOS) as partial:
        partial.write_text(text + "\n")


def _write_tables(
    new: Path, accepted: Sequence[Clip], rejected: Sequence[tuple[dict[str, Any], Clip | None]]
) -> None:
    rows = [dataclasses.asdict(clip) | {"accepted": True, "reason": None} for clip in accepted]
    rows += [
        dataclasses.asdict(clip) | {"accepted": False, "reason": row["reason"]}
        for row, clip in rejected
        if clip is not None
    ]
    rows.sort(key=lambda row: row["id"])
    for name, lines in ((MANIFEST, rows), (REJECTED, [row for row, _ in rejected])):
        with whole(new / name) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_sheets(
    new: Path,
    folder: Path,
    accepted: Sequence[Clip],
    rejected: Sequence[tuple[dict[str, Any], Clip | None]],
    fps: float,
) -> None:
    """Contact sheets, clips at even distances; none where there is nothing to show."""
    shown = [(clip, f"{clip.frames / fps:.1f} s  {clip.id}") for clip in accepted]
    refused = [(clip, f"{row['reason']}  {clip.id}") for row, clip in rejected if clip is not None]
    for name, clips in zip(SHEETS, (shown, refused), strict=True):
        if clips:
            picks = np.linspace(0, len(clips) - 1, min(SHEET_CLIPS, len(clips))).round().astype(int)
            cells = [_picture(folder, clips[pick][0]) for pick in picks]
            labels = [clips[pick][1] for pick in picks]
            pictures.save_png(new / name, pictures.labelled_sheet(cells, labels))


def _picture(folder: Path, clip: Clip) -> np.ndarray:
    with Image.open(store.record_file(folder, clip).with_suffix(".png")) as image:
        return np.asarray(image.convert("RGB"))
