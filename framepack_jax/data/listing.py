"""List the videos of a folder or a manifest, with their captions, before anything is decoded.

The list is a temporary database on disk, so that memory does not grow with the number of videos. A
bad file, row or caption is recorded with its reason and does not stop the listing.
"""

import collections
import contextlib
import errno
import itertools
import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from framepack_jax.data import captions, clip_cache, manifests
from framepack_jax.data.captions import NOT_TEXT, escaped
from framepack_jax.data.clip_cache import CachedVideo
from framepack_jax.data.manifests import Row
from framepack_jax.data.records import DatasetError
from framepack_jax.data.rejected import SUFFIXES, Rejected

# Kinds of files in the summary of those left out.
KINDS_SHOWN = 12
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
TABLES = """
PRAGMA journal_mode = OFF;
CREATE TABLE videos (
    id TEXT, caption TEXT, source TEXT, size INTEGER, changed INTEGER, start REAL, stop REAL,
    PRIMARY KEY (id, caption)
) WITHOUT ROWID;
CREATE TABLE rejected (source TEXT, line INTEGER, reason TEXT, detail TEXT);
CREATE TABLE places (path BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE links (path BLOB PRIMARY KEY) WITHOUT ROWID;
"""


class Problem(NamedTuple):
    """A rejected file or row: its name, its number in the manifest if there is one, the reason and
    the details."""

    source: str
    row: int | None
    reason: str
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """Return a line of rejected.jsonl."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Listing:
    """Videos in the order of their ids; can be iterated several times.

    `left_out` counts the files of a folder that are no videos, by suffix.
    """

    def __init__(self, folder: Path, empty_captions: bool = False) -> None:
        self.folder, self.empty_captions = folder, empty_captions
        self.left_out: collections.Counter[str] = collections.Counter()
        # Clips are packed in a thread, which reads the list too.
        self._base = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._base.executescript(TABLES)
        self._count: int | None = None

    def __len__(self) -> int:
        if self._count is None:
            ids = "SELECT count(*) FROM (SELECT DISTINCT id FROM videos)"
            self._count = self._base.execute(ids).fetchone()[0]
        return self._count

    def __iter__(self) -> Iterator[CachedVideo]:
        rows = self._base.execute(
            "SELECT id, source, size, changed, start, stop, caption FROM videos"
            " ORDER BY id, caption"
        )
        for video, same in itertools.groupby(rows, key=lambda row: row[:-1]):
            name, source, size, changed, start, end = video
            texts = tuple(row[-1] for row in same)
            yield CachedVideo(
                name, source, self.folder / source, texts, (size, changed), start, end
            )

    def share(self, index: int, count: int) -> Iterator[CachedVideo]:
        """Yield every `count`-th video, from number `index` on."""
        return itertools.islice(self, index, None, count)

    def problems(self) -> Iterator[Problem]:
        """Yield the rejected files and rows in the order of their names."""
        rows = self._base.execute("SELECT * FROM rejected ORDER BY source, line, reason, detail")
        return itertools.starmap(Problem, rows)

    def has(self, source: str, stamp: list[int]) -> bool:
        """Return whether a video of this name and stamp is listed, or a span of one."""
        found = self._base.execute(
            "SELECT 1 FROM videos WHERE id >= ? AND id < ? AND size = ? AND changed = ?",
            (clip_cache.video_id(source), clip_cache.video_id(source) + "A", *stamp),
        )
        return found.fetchone() is not None

    def is_new(self, path: str) -> bool:
        """Note a real path; return whether it was not noted before."""
        added = self._base.execute("INSERT OR IGNORE INTO places VALUES (?)", (os.fsencode(path),))
        return added.rowcount == 1

    def put_off(self, link: Path) -> None:
        """Keep a link for `next_link`."""
        self._base.execute("INSERT INTO links VALUES (?)", (os.fsencode(link),))

    def next_link(self) -> Path | None:
        """Return and forget the first link by name; None if there is none."""
        first = "DELETE FROM links WHERE path = (SELECT min(path) FROM links) RETURNING path"
        found = self._base.execute(first).fetchall()
        return Path(os.fsdecode(found[0][0])) if found else None

    def add(self, row: Row | Rejected, number: int | None = None, name: str = "") -> None:
        """List the video of a row, or reject the row under its own name, else under `name`."""
        try:
            if isinstance(row, Rejected):
                raise row
            name = escaped(row.video)
            self._add(row)
        except Rejected as error:
            values = (name, number, error.reason, escaped(error.detail))
            self._base.execute("INSERT INTO rejected VALUES (?, ?, ?, ?)", values)

    def _add(self, row: Row) -> None:
        source = _name_in(self.folder, row.video)
        stamp = _stamp(self.folder / source, source)
        name = clip_cache.video_id(source, row.start, row.end)
        added = [
            self._base.execute(
                "INSERT OR IGNORE INTO videos VALUES (?, ?, ?, ?, ?, ?, ?)",
                (name, caption, source, *stamp, row.start, row.end),
            ).rowcount
            for caption in self._captions(row, source)
        ]
        if not any(added):
            raise Rejected("repeated", f"{source} is listed twice with the same caption")

    def _captions(self, row: Row, source: str) -> list[str]:
        """Return the captions of the row, or of the file beside the video. Raises Rejected."""
        given = [text for text in row.captions if text.strip()]
        if not given:
            beside = captions.caption_beside(self.folder / source)
            given = [beside] if beside else []
        if not given and self.empty_captions:
            return [""]
        if not given:
            raise Rejected(
                "no_caption",
                f"{source} has no caption; write one into {Path(source).with_suffix('.txt').name}"
                " beside it or into the manifest, or give --empty-captions",
            )
        return [captions.check(text, f"the caption of {source}") for text in dict.fromkeys(given)]


def list_videos(source: Path, empty_captions: bool = False) -> Listing:
    """List the videos of a folder or a manifest. Raises DatasetError if it names no videos or is
    unreadable."""
    if not source.exists():
        raise DatasetError(f"--videos {source} does not exist; expected a folder or a manifest")
    folder = (source if source.is_dir() else source.parent).absolute()
    listing = Listing(folder, empty_captions)
    if source.is_dir():
        _add_folder(listing)
    else:
        for number, row in manifests.read_rows(source):
            listing.add(row, number, escaped(source.name))
    if not len(listing) and next(listing.problems(), None) is None:
        left_out = f"; left out: {say_left_out(listing.left_out)}" if listing.left_out else ""
        raise DatasetError(
            f"--videos {source} has no videos; expected files with {', '.join(SUFFIXES)}{left_out}"
        )
    return listing


def say_left_out(counts: collections.Counter[str]) -> str:
    """Format counts by suffix: 1 .jpg, 2 .wmv"""
    said = [f"{count} {kind}" for kind, count in sorted(counts.most_common(KINDS_SHOWN))]
    others = counts.total() - sum(count for _, count in counts.most_common(KINDS_SHOWN))
    return ", ".join(said + [f"{others} others"] * bool(others))


def _add_folder(listing: Listing) -> None:
    """List all videos below the folder. Links come last, so that a file with several names is
    listed under its own."""
    place: Path | None = listing.folder
    while place is not None:
        for file in _files(listing, place) if place.is_dir() else [place]:
            _add_file(listing, file)
        place = listing.next_link()


def _files(listing: Listing, folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that was not visited before; links are deferred."""
    if not listing.is_new(os.path.realpath(folder)):
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.is_symlink():
                    listing.put_off(path)
                elif entry.is_dir():
                    yield from _files(listing, path)
                else:
                    yield path
    except OSError as error:
        problem = Rejected("unreadable", f"the folder cannot be read ({error.strerror})")
        listing.add(problem, name=escaped(str(folder.relative_to(listing.folder))))


def _add_file(listing: Listing, file: Path) -> None:
    suffix = file.suffix.lower()
    if suffix in captions.SUFFIXES:
        return
    if suffix not in SUFFIXES:
        listing.left_out[escaped(suffix) or "without suffix"] += 1
    elif not listing.is_new(os.path.realpath(file)):
        listing.left_out["linked again"] += 1
    else:
        listing.add(Row(str(file.relative_to(listing.folder))))


def _name_in(folder: Path, name: str) -> str:
    """Return the name of a video, relative to the folder if it lies there. Raises Rejected."""
    if NOT_TEXT.search(name):
        raise Rejected("bad_name", f"{escaped(name)} is not valid UTF-8; rename the file")
    if ADDRESS.match(name):
        raise Rejected("missing", f"{name} is an address; download it, and write the file's name")
    path = folder / os.path.expanduser(name)
    with contextlib.suppress(ValueError):
        path = path.relative_to(folder)
    return str(path)


def _stamp(path: Path, source: str) -> tuple[int, int]:
    """Return the size of a file in bytes and its modification time in ns. Raises Rejected."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Rejected("missing", f"{source} does not exist") from error
    except OSError as error:
        reason = "bad_name" if error.errno == errno.ENAMETOOLONG else "unreadable"
        raise Rejected(reason, f"{source} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise Rejected("unreadable", f"{source} is not a file")
    return found.st_size, found.st_mtime_ns
