"""Write a dataset from cached clips: apply thresholds, write shards by bucket and tables.

The new dataset is written beside the existing one, which it replaces when it is complete. Only
files are renamed, the index last, so that a dataset is readable at every moment. Accepted and
rejected clips are kept in a temporary database on disk, so that memory does not grow with their
number.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from framepack_jax import video as pictures
from framepack_jax.data import clip_cache, records
from framepack_jax.data.clip_cache import CachedVideo
from framepack_jax.data.filters import Thresholds
from framepack_jax.data.listing import Listing, say_left_out
from framepack_jax.data.records import Clip, DatasetError, Index
from framepack_jax.data.shard_writer import ShardWriter
from framepack_jax.utils.files import atomic_write
from framepack_jax.utils.prefetch import map_ahead

MANIFEST, REJECTED = "manifest.jsonl", "rejected.jsonl"
# The videos of the dataset: one line with the place of the listing, then one line per video with
# its name and stamp. Older datasets have one JSON object.
VIDEOS, VIDEOS_BEFORE = "videos.jsonl", "videos.json"
SHEETS = ("accepted.png", "rejected.png")
SHEET_CLIPS = 24
# Beside the shards, in the order of writing; the index comes last.
PARTS = (VIDEOS_BEFORE, VIDEOS, MANIFEST, REJECTED, *SHEETS, records.INDEX)
TABLES = """
PRAGMA journal_mode = OFF;
CREATE TABLE clips (
    number INTEGER PRIMARY KEY, reason TEXT, height INTEGER, width INTEGER, frames INTEGER,
    tokens INTEGER, clip TEXT
);
CREATE TABLE rejected (reason TEXT, line TEXT);
CREATE TABLE hashes (hash REAL PRIMARY KEY) WITHOUT ROWID;
"""


@dataclasses.dataclass(frozen=True)
class Packed:
    """Summary of a dataset: accepted clips, their seconds and buckets, rejections by reason, number
    of captions cut after `text_tokens`, files left out by suffix, and clips that each device
    encoded now."""

    clips: int
    seconds: float
    buckets: dict[tuple[int, int], int]
    rejected: dict[str, int]
    cut_captions: int = 0
    left_out: Mapping[str, int] = dataclasses.field(default_factory=collections.Counter)
    encoded: tuple[int, ...] = ()
    text_tokens: int = 0

    def __str__(self) -> str:
        lines = []
        if len(self.encoded) > 1 and any(self.encoded):
            each = ", ".join(map(str, self.encoded))
            lines.append(
                f"encoded   {sum(self.encoded)} clips on {len(self.encoded)} devices: {each}"
            )
        lines += [f"accepted  {self.clips} clips, {self.seconds / 60:.1f} minutes"]
        lines += [f"  {h:>5} x {w:<5} {count:>7}" for (h, w), count in self.buckets.items()]
        lines.append(f"rejected  {sum(self.rejected.values())}")
        lines += [f"  {reason:<14}{count:>7}" for reason, count in self.rejected.items()]
        if self.cut_captions:
            lines.append(
                f"captions cut: {self.cut_captions}, after {self.text_tokens} tokens; they have"
                f" more caption_tokens in {MANIFEST}"
            )
        if self.left_out:
            lines.append(f"left out: {say_left_out(collections.Counter(self.left_out))}")
        return "\n".join(lines)


def check_any(folder: epath.PathLike, source: Path, listing: Listing) -> None:
    """Raise DatasetError if every video of the listing was rejected; write rejected.jsonl into a
    folder without a dataset."""
    if len(listing):
        return
    reasons = collections.Counter(problem.reason for problem in listing.problems())
    first = next(listing.problems())
    place = "" if first.row is None else f", row {first.row}"
    if not (folder / records.INDEX).exists():
        lines = (json.dumps(problem.as_dict()) for problem in listing.problems())
        _write_lines(folder / REJECTED, lines)
    raise DatasetError(
        f"--videos {source} has no video that can be taken, of {reasons.total()}"
        f" ({', '.join(f'{count} {reason}' for reason, count in reasons.most_common())});"
        f" the first{place}: {first.detail}"
    )


def check_videos(folder: epath.PathLike, source: Path, listing: Listing) -> None:
    """Raise DatasetError if a folder holds a dataset of other videos.

    Such a dataset was made from another listing than `source` and shares no video with `listing`.
    """
    folder = epath.Path(folder)
    file = next((folder / n for n in (VIDEOS, VIDEOS_BEFORE) if (folder / n).exists()), None)
    if file is None:
        return
    here = str(Path(source).resolve())
    try:
        with contextlib.closing(_read_videos(file)) as videos:
            place = next(videos)
            if place == here or any(listing.has(*video) for video in videos):
                return
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise DatasetError(
            f"{file}, which lists the videos of the dataset, is damaged ({error}); if they are"
            f" those of {source}, give --replace"
        ) from error
    raise DatasetError(
        f"--output {folder} is a dataset of the videos of {place}, and --videos {source} has none"
        " of them; give another --output, or --replace to replace the dataset"
    )


def _read_videos(file: epath.Path) -> Generator[Any, None, None]:
    """Yield the place of the listing, then (name, stamp) of each video."""
    with file.open() as lines:
        head = json.loads(lines.readline())
        yield head["listing"]
        if file.name == VIDEOS_BEFORE:
            yield from head["videos"].items()
            return
        for line in lines:
            video = json.loads(line)
            yield video["video"], video["stamp"]


def pack(
    folder: epath.PathLike,
    source: Path,
    listing: Listing,
    thresholds: Thresholds,
    index: Index,
    empty: Any,
    wait: Callable[[CachedVideo], None] = lambda video: None,
) -> Packed:
    """Write a dataset of the cached videos, which replaces an existing one when it is complete.

    Args:
        source: place of the listing.
        index: index of the dataset, without shards.
        empty: states of the empty prompt, (n, D) and (D,).
        wait: returns when a video is cached. Clips are written as videos become ready.

    Raises OSError, DatasetError, and what `wait` raises.
    """
    folder = epath.Path(folder)
    new = folder / records.NEW
    new.rmtree(missing_ok=True)
    new.mkdir()
    try:
        with contextlib.closing(Judged(folder, index)) as judged:
            shards = _write_clips(folder, judged, judged.judge(listing, thresholds, wait))
            _write_tables(new, judged)
            _write_videos(new, source, listing)
            name = records.write_empty(folder, *empty)
            _write_sheets(new, judged)
            records.write_index(new, dataclasses.replace(index, shards=tuple(shards), empty=name))
            _move(new, folder)
            return judged.packed(listing)
    finally:
        with contextlib.suppress(OSError):
            new.rmtree(missing_ok=True)
        # Of the old dataset once the new one is complete, else of the new one. A damaged index
        # names no files: none is removed.
        with contextlib.suppress(OSError, DatasetError):
            records.remove_unlisted(folder)


def _move(new: epath.Path, folder: epath.Path) -> None:
    """Move the tables and the index of a dataset to its folder; remove tables that it lacks."""
    for name in PARTS:
        if (new / name).exists():
            (new / name).replace(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


class Judged:
    """The clips of all videos in order, each with the reason of its rejection, None if it is
    accepted; and the lines of rejected.jsonl."""

    def __init__(self, folder: epath.PathLike, index: Index) -> None:
        self.folder, self.index = folder, index
        self._base = sqlite3.connect("", isolation_level=None)
        self._base.executescript(TABLES)

    def close(self) -> None:
        self._base.close()

    def judge(
        self, listing: Listing, thresholds: Thresholds, wait: Callable[[CachedVideo], None]
    ) -> Iterator[Clip]:
        """Judge the cached clips of all listed videos; yield those that are accepted, in order."""
        for problem in listing.problems():
            self._reject(problem.as_dict())
        for video in listing:
            wait(video)
            clips, rejected = clip_cache.clips_of(self.folder, video)
            if rejected is not None:
                self._reject({"source": video.source, **rejected})
            yield from self._judge(self._placed(clips, video), thresholds)

    def _placed(self, clips: list[Clip], video: CachedVideo) -> list[Clip]:
        """Return the clips; in pixels mode, with the present path of their video."""
        if self.index.mode == "latents":
            return clips
        return [dataclasses.replace(clip, source=str(video.path)) for clip in clips]

    def _judge(self, clips: list[Clip], thresholds: Thresholds) -> Iterator[Clip]:
        """Judge the clips of a video; yield those that are accepted. Clips of the same frames with
        other captions share the result of the first."""
        before, reason = None, None
        for clip in clips:
            if before is None or clip.start != before.start:
                seconds = clip.frames / self.index.fps
                reason = thresholds.judge(seconds, clip.scores, self)
            self._add(clip, reason)
            if reason is None:
                yield clip
            before = clip

    def __contains__(self, value: object) -> bool:
        """Return True if a clip with this hash was accepted."""
        found = self._base.execute("SELECT 1 FROM hashes WHERE hash = ?", (value,))
        return found.fetchone() is not None

    def _add(self, clip: Clip, reason: str | None) -> None:
        text = json.dumps(dataclasses.asdict(clip))
        values = (reason, clip.height, clip.width, clip.frames, clip.caption_tokens, text)
        self._base.execute("INSERT INTO clips VALUES (NULL, ?, ?, ?, ?, ?, ?)", values)
        if reason is None:
            hashed = (clip.scores["hash"],)
            self._base.execute("INSERT OR IGNORE INTO hashes VALUES (?)", hashed)
        else:
            row = {"source": clip.source, "id": clip.id, "reason": reason}
            self._reject(row | {"detail": _detail(clip, self.index.fps)})

    def _reject(self, row: dict[str, Any]) -> None:
        self._base.execute("INSERT INTO rejected VALUES (?, ?)", (row["reason"], json.dumps(row)))

    def clips(self, where: str = "1") -> Iterator[tuple[Clip, str | None]]:
        """Yield (clip, reason) of the clips that meet an SQL condition, in order."""
        rows = self._base.execute(f"SELECT clip, reason FROM clips WHERE {where} ORDER BY number")
        return ((Clip(**json.loads(clip)), reason) for clip, reason in rows)

    def rejected(self) -> Iterator[str]:
        """Yield the lines of rejected.jsonl."""
        return (line for (line,) in self._base.execute("SELECT line FROM rejected ORDER BY rowid"))

    def buckets(self) -> dict[tuple[int, int], int]:
        """Count the accepted clips of each bucket."""
        rows = self._base.execute(
            "SELECT height, width, count(*) FROM clips WHERE reason IS NULL"
            " GROUP BY height, width ORDER BY height, width"
        )
        return {(height, width): count for height, width, count in rows}

    def picks(self, where: str) -> list[tuple[Clip, str | None]]:
        """Return at most `SHEET_CLIPS` of the clips that meet a condition, evenly spaced."""
        (count,) = self._base.execute(f"SELECT count(*) FROM clips WHERE {where}").fetchone()
        places = np.linspace(0, count - 1, min(SHEET_CLIPS, count)).round().astype(int)
        wanted = set(places.tolist())
        return [found for n, found in enumerate(self.clips(where)) if n in wanted]

    def packed(self, listing: Listing) -> Packed:
        """Return the summary of the dataset."""
        accepted = "FROM clips WHERE reason IS NULL"
        clips, frames = self._base.execute(
            f"SELECT count(*), coalesce(sum(frames), 0) {accepted}"
        ).fetchone()
        (cut,) = self._base.execute(
            f"SELECT count(*) {accepted} AND tokens > {self.index.text_tokens}"
        ).fetchone()
        reasons = self._base.execute(
            "SELECT reason, count(*) FROM rejected GROUP BY reason ORDER BY count(*) DESC, reason"
        )
        seconds = frames / self.index.fps
        return Packed(
            clips, seconds, self.buckets(), dict(reasons), cut, listing.left_out,
            text_tokens=self.index.text_tokens,
        )  # fmt: skip


def _detail(clip: Clip, fps: float) -> str:
    scores = ", ".join(f"{name} {value:g}" for name, value in clip.scores.items() if name != "hash")
    return f"{clip.frames / fps:.2f} s from {clip.start:.2f} s; {scores}"


def _write_clips(
    folder: epath.PathLike, judged: Judged, clips: Iterator[Clip]
) -> list[records.Shard]:
    """Write the records of clips to the shards of their buckets, in order; return the shards by
    bucket."""

    def read(clip: Clip) -> bytes:
        return clip_cache.record_file(judged.folder, clip).read_bytes()

    writers: dict[tuple[int, int], ShardWriter] = {}
    with contextlib.ExitStack() as exits:
        for clip, data in exits.enter_context(contextlib.closing(map_ahead(read, clips))):
            if judged.index.mode == "pixels":
                data = records.pack(records.unpack(data)._replace(clip=clip))
            bucket = clip.height, clip.width
            if bucket not in writers:
                writer = ShardWriter(folder, bucket)
                writers[bucket] = exits.enter_context(contextlib.closing(writer))
            writers[bucket].add(data, judged.index.length(clip.frames))
        return [shard for _, writer in sorted(writers.items()) for shard in writer.finish()]


def _write_videos(new: epath.Path, source: Path, listing: Listing) -> None:
    videos = itertools.groupby(listing, key=lambda video: video.source)
    rows = ({"video": name, "stamp": next(spans).stamp} for name, spans in videos)
    head = {"listing": str(Path(source).resolve())}
    _write_lines(new / VIDEOS, map(json.dumps, itertools.chain([head], rows)))


def _write_tables(new: epath.Path, judged: Judged) -> None:
    rows = (
        dataclasses.asdict(clip) | {"accepted": reason is None, "reason": reason}
        for clip, reason in judged.clips()
    )
    _write_lines(new / MANIFEST, map(json.dumps, rows))
    _write_lines(new / REJECTED, judged.rejected())


def _write_lines(path: epath.Path, lines: Iterable[str]) -> None:
    with atomic_write(path) as partial, open(partial, "w") as file:
        file.writelines(f"{line}\n" for line in lines)


def _write_sheets(new: epath.Path, judged: Judged) -> None:
    """Write contact sheets of evenly spaced clips; none if there are no clips."""
    for name, where in zip(SHEETS, ("reason IS NULL", "reason IS NOT NULL"), strict=True):
        shown = judged.picks(where)
        if shown:
            cells = [_picture(judged.folder, clip) for clip, _ in shown]
            labels = [
                f"{reason or f'{clip.frames / judged.index.fps:.1f} s'}  {clip.id}"
                for clip, reason in shown
            ]
            pictures.save_png(new / name, pictures.labelled_sheet(cells, labels))


def _picture(folder: epath.PathLike, clip: Clip) -> np.ndarray:
    file = clip_cache.record_file(folder, clip).with_suffix(".png")
    with file.open("rb") as data, Image.open(data) as image:
        return np.asarray(image.convert("RGB"))
