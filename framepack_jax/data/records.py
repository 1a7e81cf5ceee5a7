"""Prepared clips on disk: one record a clip, in ArrayRecord shards by bucket.

    dataset.json                 the index below, written last: a folder without it is not a dataset
    shards/480x832-00000-DIGEST.arrayrecord   records, "group_size:1,uncompressed"
    shards/empty-DIGEST.safetensors           the empty prompt's states, for caption dropout
    dataset.new/                 tables of the next dataset

Names of files contain a digest of their content, so that the files of the next dataset lie beside
those of this one until its index replaces this index. Older datasets have names without a digest.

A record is a safetensors blob, so that its arrays are views of the bytes that were read. Sections
are cut from clips when training: one dataset serves every schedule and latent window.

Shapes: T latent frames, h w latent rows and columns, C latent channels, n prompt tokens, D widths.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from framepack_jax.data.array_records import (
    FIRST,
    Place,
    read_from_disk,
    read_from_store,
)
from framepack_jax.models.sizes import MAX_PROMPT_TOKENS
from framepack_jax.utils.files import atomic_write
from framepack_jax.utils.messages import first_line
from framepack_jax.utils.paths import is_remote

FORMAT = 2
INDEX, EMPTY, SHARDS, NEW = "dataset.json", "empty.safetensors", "shards", "dataset.new"
# safetensors keeps them under a type of its own; numpy knows them as two bytes.
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ARRAYS = ("text", "pooled", "image", "latents")


class DatasetError(ValueError):
    """A dataset that is missing, incomplete, damaged or unsuitable."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """Source, size, caption and scores of a clip.

    Args:
        source: name of the video in the listing, or its path if training reads it.
        start: seconds from the start of the video.
        frames: number of frames at the frame rate of the dataset: 1 + 4 k, or whole chunks.
        height: rows of the bucket in pixels.
        width: columns of the bucket in pixels.
        scores: scores that `filters` compares with thresholds.
        caption_tokens: length of the caption; the networks read the first tokens of it.
    """

    id: str
    source: str
    start: float
    frames: int
    height: int
    width: int
    caption: str
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    caption_tokens: int = 0

    @property
    def entry(self) -> str:
        """Name of the source video, or of a span of it, in the clip cache."""
        return self.id.rpartition("-")[0]

    @property
    def video(self) -> str:
        """Name of the source video without the span."""
        return self.entry.partition("@")[0]


class Record(NamedTuple):
    """A clip with the arrays that training reads, in bfloat16.

    `text` (n, D) holds the states of the prompt, `pooled` (D,) its pooled state, `image`
    (tokens, D) the states of the first frame; these two are None if the bundle has no encoder for
    them. `latents` (T, h, w, C) are normalised. Position 0 is the first frame encoded alone, as in
    sampling; the other positions are those of the whole clip. If the clip is encoded in chunks,
    positions follow each other chunk by chunk. `latents` is None if training encodes the frames.
    """

    clip: Clip
    text: np.ndarray
    pooled: np.ndarray | None
    image: np.ndarray | None
    latents: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records of one bucket: its name without the digest, and the bucket in pixels.

    For each record it lists the latent frames, the digest of the video's name, the tokens of the
    caption, the end of its bytes in the file, and their CRC-32. `digest` is that of all records.
    Older datasets lack the last four.
    """

    file: str
    height: int
    width: int
    lengths: tuple[int, ...]
    videos: tuple[str, ...]
    # Excluded from the repr, which identifies a dataset.
    tokens: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    digest: str = dataclasses.field(default="", repr=False)
    ends: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    crcs: tuple[int, ...] = dataclasses.field(default=(), repr=False)

    @property
    def path(self) -> str:
        """Place of the file in the dataset."""
        return f"{SHARDS}/{with_digest(self.file, self.digest)}"

    def place(self, number: int) -> Place:
        """Return where a record lies in the file. Raises DatasetError for an older dataset."""
        if not self.ends:
            raise DatasetError(
                "the dataset was written by an earlier version, and its records cannot be read from"
                " an object store; prepare it again, which encodes nothing again, or copy it to a"
                " disk"
            )
        begin = self.ends[number - 1] if number else FIRST
        return Place(begin, self.ends[number], self.crcs[number])


@dataclasses.dataclass(frozen=True)
class Index:
    """The content of `dataset.json`.

    `fingerprint` holds every setting that determines the records: hashes of the VAE and the
    encoders, tiling, prompt template, frame rate, buckets. `empty` is the file of the empty prompt.
    `chunk` is the number of latent frames that are encoded alone, 0 if a clip is encoded at once;
    `text_tokens` the number of tokens of a caption that the networks read.
    """

    mode: Literal["latents", "pixels"]
    shards: tuple[Shard, ...]
    fingerprint: dict[str, Any]
    fps: float
    time_compression: int
    space_compression: int
    channels: int
    empty: str = EMPTY
    chunk: int = 0
    text_tokens: int = MAX_PROMPT_TOKENS

    @property
    def clips(self) -> int:
        return sum(len(shard.lengths) for shard in self.shards)

    def length(self, frames: int) -> int:
        """Return the latent frames of a clip of so many frames."""
        if self.chunk:
            return frames // self.frames_of(self.chunk) * self.chunk
        return 1 + (frames - 1) // self.time_compression

    def frames_of(self, latents: int) -> int:
        """Return the frames of latents that are encoded at once."""
        return 1 + (latents - 1) * self.time_compression

    @functools.cached_property
    def record_buckets(self) -> list[tuple[int, int]]:
        """Bucket of each record."""
        return [(s.height, s.width) for s in self.shards for _ in s.lengths]

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Buckets in use, in pixels, by increasing height."""
        return sorted({(shard.height, shard.width) for shard in self.shards})


def pack(record: Record) -> bytes:
    """Serialize a record; equal records give equal bytes."""
    arrays = {name: getattr(record, name) for name in ARRAYS if getattr(record, name) is not None}
    stored = {name: np.ascontiguousarray(array).astype(BFLOAT16) for name, array in arrays.items()}
    clip = json.dumps(dataclasses.asdict(record.clip), sort_keys=True)
    return safetensors.numpy.save(stored, metadata={"clip": clip})


def unpack(data: bytes) -> Record:
    """Read the bytes of `pack`; the arrays are views of them. Raises DatasetError."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8 : 8 + length]))
        clip = Clip(**json.loads(header.pop("__metadata__")["clip"]))
        body = memoryview(data)[8 + length :]
        arrays = {name: _view(body, entry) for name, entry in header.items()}
        fields: dict[str, Any] = {name: arrays.get(name) for name in ARRAYS}
        return Record(clip, **fields)
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"a record is damaged ({error})") from error


def _view(body: memoryview, entry: Mapping[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    if entry["dtype"] != "BF16":
        raise ValueError(f"an array of {entry['dtype']}, expected BF16")
    return np.frombuffer(body[begin:end], BFLOAT16).reshape(entry["shape"])


def with_digest(file: str, digest: str) -> str:
    """Return the name of a file with the digest of its content; older files have none."""
    stem, _, suffix = file.rpartition(".")
    return f"{stem}-{digest}.{suffix}" if digest else file


def remove_unlisted(folder: epath.PathLike) -> None:
    """Remove the files of earlier or unfinished datasets, which the index does not name."""
    folder = epath.Path(folder)
    kept: set[str] = set()
    if (folder / INDEX).exists():
        index = read_index(folder)
        kept = {index.empty, *(shard.path for shard in index.shards)}
    if EMPTY not in kept:
        (folder / EMPTY).unlink(missing_ok=True)
    for file in (folder / SHARDS).iterdir() if (folder / SHARDS).exists() else ():
        if f"{SHARDS}/{file.name}" not in kept:
            file.unlink()


def write_index(folder: epath.PathLike, index: Index) -> None:
    """Write the index atomically, which completes a dataset."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(index)}, indent=1)
    with atomic_write(epath.Path(folder) / INDEX) as partial:
        partial.write_text(text + "\n")


def read_index(folder: epath.PathLike) -> Index:
    """Read `dataset.json` and check that its shards exist. Raises DatasetError."""
    folder = epath.Path(folder)
    file = folder / INDEX
    if not file.exists():
        begun = any((folder / name).exists() for name in (SHARDS, NEW))
        what = "an unfinished dataset" if begun else "not a dataset"
        raise DatasetError(
            f"{folder} is {what} (it has no {INDEX}); make one with: framepack prepare --videos"
            f" FOLDER --bundle BUNDLE --output {folder}"
        )
    try:
        fields = json.loads(file.read_text())
        version = fields.pop("format")
        if version != FORMAT:
            raise DatasetError(
                f"dataset {folder} has format {version}, this version reads format {FORMAT};"
                " prepare it again"
            )
        shards = [_shard(shard) for shard in fields.pop("shards")]
        index = Index(shards=tuple(shards), **fields)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DatasetError(f"{file} is damaged ({error}); prepare the dataset again") from error
    # One listing, as an object store answers each question in 0.1 s.
    files = [f.name for f in (folder / SHARDS).iterdir()] if index.shards else []
    there = {f"{SHARDS}/{name}" for name in files}
    if missing := [s.path for s in index.shards if s.path not in there]:
        raise DatasetError(
            f"dataset {folder} lacks {len(missing)} of its shards, as {missing[0]}; copy them, or"
            " prepare it again"
        )
    return index


def _shard(fields: Mapping[str, Any]) -> Shard:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Shard(**values)


def write_empty(folder: epath.PathLike, text: np.ndarray, pooled: np.ndarray | None) -> str:
    """Write the states (n, D) and (D,) or None of the empty prompt; return the name of the file."""
    states = {"text": text, "pooled": pooled}
    data = safetensors.numpy.save(
        {name: array.astype(BFLOAT16) for name, array in states.items() if array is not None}
    )
    name = f"{SHARDS}/{with_digest(EMPTY, hashlib.sha256(data).hexdigest()[:16])}"
    path = epath.Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(data)
    return name


def read_empty(folder: epath.PathLike, index: Index) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the states (n, D) and (D,) or None of the empty prompt. Raises DatasetError."""
    file = epath.Path(folder) / index.empty
    if not file.exists():
        raise DatasetError(f"dataset {folder} lacks {index.empty}; prepare it again")
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = memoryview(data)[8 + length :]
    pooled = _view(body, header["pooled"]) if "pooled" in header else None
    return _view(body, header["text"]), pooled


class VideoSource:
    """Grain source of the records of some shards, by number; thread-safe."""

    def __init__(self, folder: epath.PathLike, shards: Iterable[Shard]) -> None:
        self.folder, self.shards = epath.Path(folder), tuple(shards)
        self._places = [(n, i) for n, s in enumerate(self.shards) for i in range(len(s.lengths))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Record:
        """Read a record. Raises DatasetError that names a damaged shard."""
        shard, i = self._places[number]
        found = self.shards[shard]
        path = self.folder / found.path
        with _named(path, i):
            if is_remote(path):
                return unpack(read_from_store(path, found.place(i)))
            return unpack(read_from_disk(path, i, len(found.lengths)))

    def place(self, number: int) -> str:
        """Return the shard and place of a record."""
        shard, i = self._places[number]
        return f"{self.shards[shard].path}, record {i}"

    def __repr__(self) -> str:
        # Grain stores this in its state, so it must not depend on the folder of the dataset.
        digest = hashlib.sha256(repr(self.shards).encode()).hexdigest()
        return f"Source({digest[:16]})"


@contextlib.contextmanager
def _named(path: epath.Path, record: int) -> Iterator[None]:
    try:
        yield
    except (DatasetError, RuntimeError, ValueError, IndexError, OSError) as error:
        line = first_line(error)
        raise DatasetError(
            f"{path}, record {record}, cannot be read ({line}); copy the shard again, or prepare"
            " the dataset again"
        ) from error
