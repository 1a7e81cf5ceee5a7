"""Read the rows of a manifest of videos: .jsonl, .json, .csv, .tsv or .parquet.

Rows are read one at a time, so that memory does not grow with the file. A bad row is given as
`Rejected`; only a file that cannot be read at all raises DatasetError. Column names are those of
common trainers and data sets: musubi-tuner (`video_path`), Hugging Face and finetrainers
(`file_name`, `video_file`), diffusers and OpenVid (`video`), Open-Sora (`path`, `text`, `cap`),
diffusion-pipe (an object of captions by name).
"""

import collections
import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from framepack_jax.data.captions import BYTE_ORDER_MARKS
from framepack_jax.data.records import DatasetError
from framepack_jax.data.rejected import Rejected

# Names of columns, in any case; of several in one row the first here is taken.
VIDEO = (
    "video", "video_path", "file_name", "file_path", "path", "video_file", "filename", "filepath",
    "file", "media_path",
)  # fmt: skip
CAPTION = ("caption", "captions", "text", "prompt", "cap", "description")
START = ("start", "start_time", "start_seconds")
END = ("end", "end_time", "end_seconds")
CHUNK = 1 << 16
MAX_ROW = 1 << 22
MAX_OBJECT = 1 << 26
SPACE = re.compile(r"[\s,]*")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Row(NamedTuple):
    """A video by its name in the manifest, its captions, and the span to use in seconds."""

    video: str
    captions: tuple[str, ...] = ()
    start: float = 0.0
    end: float = math.inf


# (number of the row, its columns or the reason of its rejection)
Fields = Iterator[tuple[int, Any]]


def read_rows(source: Path) -> Iterator[tuple[int, Row | Rejected]]:
    """Yield (number, row) of a manifest, numbered as lines, as spreadsheet rows, or from 1.

    Raises DatasetError if the file is not a manifest, or has no column of videos.
    """
    reader = READERS.get(source.suffix.lower())
    if reader is None:
        raise DatasetError(
            f"--videos {source}: expected a folder, or a file of {', '.join(READERS)}"
        )
    try:
        for number, fields in reader(source):
            yield number, _row_or_problem(fields)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{source} is not {error.encoding} text ({error}); write UTF-8"
        ) from None


def _row_or_problem(fields: Any) -> Row | Rejected:
    try:
        return fields if isinstance(fields, Rejected) else _row(fields)
    except Rejected as error:
        return error


def _row(fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise Rejected(
            "bad_row",
            f'{str(fields)[:80]} is not an object; expected {{"video": ..., "caption": ...}}',
        )
    given = {str(name).strip().lower(): value for name, value in fields.items()}
    columns = [name for name in VIDEO if name in given]
    if not columns:
        names = ", ".join(given)[:200] or "none"
        raise Rejected(
            "bad_row", f"it names no video; its columns are {names}; expected {_either(VIDEO)}"
        )
    column = next((name for name in columns if given[name] not in (None, "")), columns[0])
    video, captions = given[column], _first(given, CAPTION)
    if not isinstance(video, str) or not video.strip():
        raise Rejected("bad_row", f"its {column} is {str(video)[:80]!r}, expected a path")
    captions = captions if isinstance(captions, list) else [captions]
    if not all(isinstance(caption, str | None) for caption in captions):
        raise Rejected("bad_row", f"caption {str(captions)[:80]} of {video} is not text")
    start, end = _seconds(_first(given, START), 0.0), _seconds(_first(given, END), math.inf)
    if not 0 <= start < end:
        raise Rejected("bad_row", f"{video}: expected 0 <= start < end, not {start:g} and {end:g}")
    return Row(video, tuple(filter(None, captions)), start, end)


def _first(given: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the first value of these names that is not empty."""
    return next((v for name in names if (v := given.get(name)) not in (None, "")), None)


def _names(fields: Mapping[Any, Any]) -> set[str]:
    """Return the normalised names of the columns of a row."""
    return {str(name).strip().lower() for name in fields}


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _seconds(value: Any, default: float) -> float:
    """Parse a number or H:MM:SS.s to seconds, rounded to milliseconds. Raises Rejected."""
    if value is None or value == "":
        return default
    try:
        if isinstance(value, str):
            parts = [float(part) for part in value.split(":")]
            value = sum(part * 60**k for k, part in enumerate(reversed(parts)))
        return round(float(value), 3)
    except (ValueError, TypeError, OverflowError) as error:
        raise Rejected("bad_row", f"{str(value)[:80]!r} is not a time; write seconds") from error


def _text(source: Path, newline: str = "\n") -> io.TextIOWrapper:
    """Open a text file by its byte order mark. A byte that is not UTF-8 becomes a lone surrogate,
    so that its row is known and the others are read."""
    with open(source, "rb") as file:
        head = file.read(4)
    encoding = next((e for m, e in BYTE_ORDER_MARKS.items() if head.startswith(m)), "utf-8")
    # Without their ends these encodings skip the mark themselves.
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding[:6]
    return open(source, encoding=encoding, errors="surrogateescape", newline=newline)


def _lines(source: Path) -> Fields:
    """Yield JSON lines. Only \\n ends a line: a caption may hold other line separators."""
    with _text(source) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_ROW)
            if not line:
                return
            if len(line) == MAX_ROW and not line.endswith("\n"):
                _skip_line(file)
                yield number, Rejected("bad_row", f"it has more than {MAX_ROW >> 20} MiB")
            elif line.strip():
                yield number, _parsed(line)


def _skip_line(file: io.TextIOWrapper) -> None:
    while (rest := file.readline(CHUNK)) and not rest.endswith("\n"):
        pass


def _parsed(line: str) -> Any:
    if bad := LONE_SURROGATE.search(line):
        at = len(line[: bad.start()].encode())
        byte = ord(bad[0]) - 0xDC00
        return Rejected("bad_row", f"byte 0x{byte:02x} at offset {at} is not UTF-8; write UTF-8")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected("bad_row", f"it is not valid JSON ({error})")


def _json(source: Path) -> Fields:
    """Yield rows of an array, of an object of captions or rows by name, or of JSON lines."""
    with _text(source) as file:
        while (first := file.read(1)).isspace():
            pass
        file.seek(0)
        if first == "[":
            yield from enumerate(_array(file, source), 1)
            return
        line, more = _parsed(file.readline(MAX_ROW)), file.read(CHUNK).strip()
        file.seek(0)
        one = isinstance(line, dict)
        if first != "{" or (one and (more or _names(line) & set(VIDEO))):
            yield from _lines(source)
        else:
            yield from enumerate(_by_name(file, source), 1)


def _array(file: io.TextIOWrapper, source: Path) -> Iterator[Any]:
    """Yield the items of an array, parsing each as soon as it is read."""
    decoder, text, count = json.JSONDecoder(), file.read(CHUNK), 0
    at = text.index("[") + 1
    while True:
        if space := SPACE.match(text, at):  # always: it may be empty
            at = space.end()
        if text[at : at + 1] == "]":
            return
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            rest, more = text[at:], file.read(max(CHUNK, len(text) - at))
            if not more or len(rest) > MAX_ROW:
                raise DatasetError(
                    f"{source} is not valid JSON after row {count} ({error})"
                ) from error
            text, at = rest + more, 0
            continue
        count += 1
        yield item


def _by_name(file: io.TextIOWrapper, source: Path) -> Iterator[dict[str, Any]]:
    text = file.read(MAX_OBJECT + 1)
    if len(text) > MAX_OBJECT:
        raise DatasetError(f"{source} is an object of more than 64 MiB; write it as .jsonl")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{source} is not valid JSON ({error})") from error
    if _names(rows) & set(VIDEO):
        yield rows
        return
    (first, *others) = rows.values() or (None,)
    if not others and isinstance(first, list) and all(isinstance(row, dict) for row in first):
        yield from first  # {"data": [rows]}
        return
    for name, row in rows.items():
        yield {"video": name, **(row if isinstance(row, dict) else {"caption": row})}


class _Lines:
    """The lines of a file for a CSV reader, which can go back within a row."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file, self._start = file, 1
        self._row: list[str] = []
        self._again: collections.deque[str] = collections.deque()

    @property
    def number(self) -> int:
        """Number of the row's first line that is not blank."""
        return self._start + next((i for i, line in enumerate(self._row) if line.strip()), 0)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._file.readline(MAX_ROW)
        if not line:
            raise StopIteration
        self._row.append(line)
        return line

    def begin_row(self) -> None:
        self._start += len(self._row)
        self._row = []

    def back_behind_first(self) -> None:
        """Go back to the second line of the row."""
        first = self.number - self._start + 1
        self._again.extendleft(reversed(self._row[first:]))
        self._row = self._row[:first]


def _table(source: Path) -> Fields:
    """Yield rows of a table whose first line names its columns. A row with an unclosed quote does
    not swallow the following rows."""
    csv.field_size_limit(MAX_ROW)
    with _text(source, newline="") as file:
        delimiter = max(",\t;|", key=file.readline(MAX_ROW).count)
        file.seek(0)
        lines = _Lines(file)
        table = csv.DictReader(lines, delimiter=delimiter, strict=True)
        _check_columns(source, table.fieldnames or ())
        row: dict[Any, Any] | None = {}
        while row is not None:
            lines.begin_row()
            try:
                row = next(table, None)
            except csv.Error as error:
                lines.back_behind_first()
                problem = f"it is not a row of a table ({error}); is a quote left open?"
                yield lines.number, Rejected("bad_row", problem)
                continue
            if row is not None:
                yield lines.number, _checked(row, delimiter)


def _checked(row: dict[Any, Any], delimiter: str) -> Any:
    if None not in row:
        return row
    return Rejected(
        "bad_row",
        f"it has {len(row) - 1 + len(row[None])} fields, the first line {len(row) - 1}; put quotes"
        f" around a caption that has {delimiter!r}",
    )


def _check_columns(source: Path, names: Iterable[str]) -> None:
    known = [name for name in names if name.strip().lower() in VIDEO]
    if not known:
        raise DatasetError(
            f"{source} has no column of videos, only {', '.join(names)[:200] or 'nothing'};"
            f" expected {_either(VIDEO)}, and {_either(CAPTION)} unless captions are in NAME.txt"
        )


def _parquet(source: Path) -> Fields:
    """Yield rows with the known columns only: others may hold the videos themselves."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DatasetError(
            f"{source} needs pyarrow to be read: pip install pyarrow; or write it as .jsonl"
        ) from error
    try:
        with parquet.ParquetFile(source) as file:
            names = file.schema_arrow.names
            _check_columns(source, names)
            known = (*VIDEO, *CAPTION, *START, *END)
            columns = [name for name in names if name.strip().lower() in known]
            number = 0
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except ArrowException as error:
        raise DatasetError(f"{source} cannot be read as Parquet ({error})") from error


READERS = {
    ".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".csv": _table, ".tsv": _table,
    ".parquet": _parquet,
}  # fmt: skip
