"""The datasets of a run: records in one numbering, those held out, and those to train on."""

import dataclasses
import functools
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from framepack_jax.data import checks, holdout, records
from framepack_jax.data.config import DataConfig
from framepack_jax.data.fingerprint import check_agreement
from framepack_jax.data.records import Clip, DatasetError, Index, Record, VideoSource


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of a run. Its records have the numbers from `first` on among those of all datasets.

    `name` identifies it in the log.
    """

    name: str
    folder: epath.Path
    index: Index
    cfg: DataConfig
    first: int = 0

    @functools.cached_property
    def source(self) -> VideoSource:
        return VideoSource(self.folder, self.index.shards)

    @functools.cached_property
    def empty(self) -> tuple[np.ndarray, np.ndarray | None]:
        """States (n, D) and (D,) or None of the empty prompt."""
        return records.read_empty(self.folder, self.index)

    def __getstate__(self) -> dict[str, Any]:
        # Leave out the cached properties: open files cannot be sent to other processes.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def record(self, number: int) -> Record:
        """Read a record. Raises DatasetError that names a damaged shard."""
        return self.source[number - self.first]

    def place(self, number: int) -> str:
        """Return the shard and place of a record."""
        return self.source.place(number - self.first)

    def bucket(self, number: int) -> tuple[int, int]:
        """Return the bucket of a record."""
        return self.index.record_buckets[number - self.first]

    def length(self, clip: Clip) -> int:
        """Return the latent frames of a clip."""
        return self.index.length(clip.frames)

    @property
    def text_tokens(self) -> int:
        """Number of tokens to which captions are padded."""
        return self.cfg.text_tokens or self.index.text_tokens

    def video(self, clip: Clip) -> Path:
        """Return the video of a clip of a dataset of mode pixels; an absolute path stays itself."""
        return Path(os.path.join(self.folder, clip.source))

    @functools.cached_property
    def by_bucket(self) -> dict[tuple[int, int], list[int]]:
        """Numbers of the records that are not held out, by bucket."""
        found: dict[tuple[int, int], list[int]] = {}
        for number in self._split[0]:
            found.setdefault(self.bucket(number), []).append(number)
        return dict(sorted(found.items()))

    @functools.cached_property
    def streams(self) -> dict[tuple[int, int], list[int]]:
        """Numbers of the records to train on, by bucket. Raises DatasetError if every bucket has
        fewer than `cfg.min_clips`."""
        least = self.cfg.min_clips
        kept = {b: numbers for b, numbers in self.by_bucket.items() if len(numbers) >= least}
        if not kept:
            most = max(map(len, self.by_bucket.values()))
            raise DatasetError(
                f"no bucket of {self.folder} has {least} clips to train on (--data.min-clips"
                f" {least}); the largest has {most}"
            )
        return kept

    @property
    def clips(self) -> int:
        """Number of the records to train on."""
        return sum(map(len, self.streams.values()))

    @functools.cached_property
    def held(self) -> list[int]:
        """Numbers of the held-out records, without those of buckets that are left out."""
        left_out = self.by_bucket.keys() - self.streams.keys()
        return [number for number in self._split[1] if self.bucket(number) not in left_out]

    @functools.cached_property
    def _split(self) -> tuple[list[int], list[int]]:
        trained, held = holdout.split(self.index, self.cfg.holdout)
        return [n + self.first for n in trained], [n + self.first for n in held]

    def facts(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, value) of what the samples of this dataset depend on."""
        yield "clips", {f"{h}x{w}": len(numbers) for (h, w), numbers in self.streams.items()}
        yield "records", repr(self.source)
        for name, value in self.index.fingerprint.items():
            yield f"made by {name}", value


def open_datasets(
    cfg: DataConfig, windows: Collection[int], given: int = 1, sections: int = 1
) -> tuple[Dataset, ...]:
    """Open the datasets of a run with sections of these latent windows, and check what can be
    checked without reading records.

    `given` is the number of latent frames before the first section, if clips are not encoded in
    chunks, and `sections` the fewest sections of a clip. Raises DatasetError.
    """
    folders = [epath.Path(path) for path in cfg.paths]
    found: list[Dataset] = []
    first = 0
    for name, folder in zip(_names(folders), folders, strict=True):
        found.append(Dataset(name, folder, records.read_index(folder), cfg, first))
        first += found[-1].index.clips
    check_agreement([(dataset.folder, dataset.index) for dataset in found])
    for dataset in found:
        _check(dataset, windows, given, sections)
    return tuple(found)


def _check(dataset: Dataset, windows: Collection[int], given: int, sections: int) -> None:
    folder, index, cfg = dataset.folder, dataset.index, dataset.cfg
    checks.check_lengths(folder, index, windows, given, sections)
    holdout.check_holdout(folder, index, cfg.holdout)
    if dataset.text_tokens < index.text_tokens:
        empty = len(dataset.empty[0]) if cfg.caption_dropout else 0
        checks.check_captions(folder, index, dataset.text_tokens, empty)
    checks.check_sources(folder, index)


def _names(folders: Sequence[epath.Path]) -> list[str]:
    """Return the last parts of folders, or the whole paths if these are not unique."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
