"""The endless stream of training samples, by Grain.

Each bucket has its own stream: its clips, reshuffled every epoch, none dropped. Batches take
samples from these streams by `BucketSchedule`. Sample e, and so batch e // B, is the same for any
number of threads, processes and hosts. An interrupted stream resumes exactly at its position, also
on another number of hosts.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from etils import epath

from framepack_jax import packing
from framepack_jax.data import checks, holdout, records
from framepack_jax.data.batch import LOST, Batch
from framepack_jax.data.bucket_schedule import BucketSchedule
from framepack_jax.data.config import DataConfig
from framepack_jax.data.pixel_batch import PixelBatch
from framepack_jax.data.records import Record
from framepack_jax.data.samples import READ_ERRORS, Samples
from framepack_jax.data.stream import POSITION, BatchStream
from framepack_jax.models.sizes import MAX_PROMPT_TOKENS

FORMAT = 1
# Grain adds the epoch to the seed of a stream: seeds of buckets are further apart than that.
SEED_STEP = 1_000_003


class HeldOut(NamedTuple):
    """The share of this host in a validation batch, and in a batch of the same shapes with the
    samples of other clips; None if the bucket has one clip only. `size` is that of the global
    batch."""

    batch: Batch | PixelBatch
    others: Batch | PixelBatch | None
    size: int


class Loader:
    """Iterate over batches forever, reading share (index, count) of each. See `open_loader`."""

    def __init__(self, samples: Samples, batch: int, share: tuple[int, int]) -> None:
        self.samples, self.batch, self.share = samples, batch, share
        self.index, self.cfg = samples.index, samples.cfg
        self.streams = samples.streams
        held = holdout.split(self.index, self.cfg.holdout)[1]
        left_out = samples.by_bucket.keys() - self.streams.keys()
        self.held = [n for n in held if self.index.record_buckets[n] not in left_out]
        self.buckets = list(self.streams)
        counts = [len(self.streams[bucket]) for bucket in self.buckets]
        self.schedule = BucketSchedule(counts, batch, self.cfg.seed)
        self._abstract: dict[Any, Batch | PixelBatch] = {}
        self._iterator = self._open()

    def _open(self) -> BatchStream:
        streams = [
            grain.MapDataset.source(self.streams[bucket])
            .seed(self.cfg.seed + SEED_STEP * (1 + number))
            .shuffle()
            .repeat()
            for number, bucket in enumerate(self.buckets)
        ]
        stream = grain.MapDataset.select_from_datasets(streams, self.schedule)
        stream = stream.map_with_index(self.samples.training)
        cfg = self.cfg
        return BatchStream(
            stream, self.batch, self.share,
            threads=cfg.threads, ahead=cfg.buffer, workers=cfg.workers,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Batch | PixelBatch]:
        return self

    def __next__(self) -> Batch | PixelBatch:
        """Return the share of the next batch. Raises DatasetError if a bucket is unreadable."""
        return next(self._iterator)

    def blank(self, ahead: int) -> Batch | PixelBatch:
        """Return a stand-in for the share of the batch `ahead` batches after the next.

        It is used if batches cannot be read: its clips are LOST, and its loss is not finite, so
        that it updates nothing.
        """
        step, share = self.step + ahead, self.batch // self.share[1]

        def zeros(x: jax.ShapeDtypeStruct) -> np.ndarray:
            return np.zeros((share, *x.shape[1:]), x.dtype)

        shapes = self.abstract(self.bucket_at(step), self.samples.schedule_of(step))
        batch = jax.tree.map(zeros, shapes)
        pooled = np.full_like(batch.conditions.pooled, np.nan)
        return batch.replace(
            conditions=batch.conditions.replace(pooled=pooled),
            meta=batch.meta.replace(clip=np.full_like(batch.meta.clip, LOST)),
        )

    def get_state(self) -> dict[str, Any]:
        """Return the position of the stream, the same on every host."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Move the stream to a position."""
        self._iterator.set_state(state)

    def close(self) -> None:
        """End the threads or processes that read ahead."""
        self._iterator.close()

    @property
    def step(self) -> int:
        """Number of the next batch, from 0."""
        return self.get_state()[POSITION] // self.batch

    def bucket_at(self, step: int) -> tuple[int, int]:
        """Return the bucket of a batch without reading it."""
        return self.buckets[self.schedule.of_step(step)[0]]

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Every setting that determines the samples and their order."""
        return {
            "format": FORMAT,
            "clips": {f"{h}x{w}": len(self.streams[h, w]) for h, w in self.buckets},
            "batch": self.batch,
            "schedule": str(self.samples.schedule),
            "windows": list(self.cfg.windows),
            "order": self.samples.schedule.order,
            "seed": self.cfg.seed,
            "holdout": self.cfg.holdout,
            "sections": self.cfg.sections,
            "caption_dropout": self.cfg.caption_dropout,
            "mode": self.index.mode,
            "records": repr(self.samples.source),
            **{f"made by {name}": value for name, value in self.index.fingerprint.items()},
        }

    def latent_size(self, bucket: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the latents of a bucket."""
        height, width = bucket
        return height // self.index.space_compression, width // self.index.space_compression

    def abstract(self, bucket: tuple[int, int], schedule: packing.Schedule) -> Batch | PixelBatch:
        """Return a global batch of a bucket and a schedule as `jax.ShapeDtypeStruct`s."""
        if (bucket, schedule) not in self._abstract:
            sample = self.samples.read_or_replace(0, self.streams[bucket][0], schedule)
            self._abstract[bucket, schedule] = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((self.batch, *np.shape(x)), np.asarray(x).dtype),
                sample,
            )
        return self._abstract[bucket, schedule]

    def check_buckets(self) -> None:
        """Raise DatasetError that names a bucket if none of its clips can be read."""
        for bucket, schedule in itertools.product(self.buckets, self.samples.schedules):
            self.abstract(bucket, schedule)

    def clip_ids(self, numbers: Sequence[int]) -> list[str]:
        """Return the names of records; the file and place of an unreadable one."""
        return [self._name(int(number)) for number in numbers]

    def _name(self, number: int) -> str:
        with contextlib.suppress(*READ_ERRORS):
            return self.samples.source[number].clip.id
        return self.samples.source.place(number)

    def fault(self, number: int) -> str | None:
        """Return why a record, or any frame of its clip, is unreadable; None if all is readable."""
        try:
            self.samples.read(0, number, self.samples.schedule)
            self.samples.read_video(number)
        except READ_ERRORS as error:
            return str(error)
        return None

    def held_out(self, count: int, max_size: int, ways: int = 1) -> list[HeldOut]:
        """Return the validation batches of `holdout.batches`, the same at every call."""
        plan = holdout.batches(
            self.held, self.index.record_buckets, self.streams, count, max_size, ways
        )
        return [
            HeldOut(
                self._stacked(batch.samples),
                None if batch.others is None else self._stacked(batch.others),
                len(batch.samples),
            )
            for batch in plan
        ]

    def _stacked(self, samples: Sequence[tuple[int, int]]) -> Batch | PixelBatch:
        """Read the share of this host in samples (element, number of the record)."""
        index, count = self.share
        schedule = self.samples.schedule
        read = [self.samples.read(*sample, schedule) for sample in samples[index::count]]
        return jax.tree.map(lambda *x: np.stack(x), *read)

    def held_out_records(self, count: int) -> list[Record]:
        """Return held-out clips, the same on every host, from as many videos as there are."""
        return [self.samples.source[number] for number in self.held[:count]]


def open_loader(
    cfg: DataConfig, schedule: packing.Schedule, batch: int, share: tuple[int, int] = (0, 1)
) -> Loader:
    """Open the stream of a dataset for a packing schedule.

    `batch` is the size of a global batch; this host reads its `share` (index, count). Raises
    DatasetError, ScheduleError, ValueError.
    """
    folder = epath.Path(cfg.path)
    index = records.read_index(folder)
    checks.check_lengths(folder, index, max(schedule.window, *cfg.windows, 1))
    holdout.check_holdout(folder, index, cfg.holdout)
    if cfg.text_tokens < MAX_PROMPT_TOKENS:
        empty = len(records.read_empty(folder, index)[0]) if cfg.caption_dropout else 0
        checks.check_captions(folder, index, cfg.text_tokens, empty)
    checks.check_sources(folder, index)
    packing.plan(schedule, 1)
    if batch % share[1]:
        raise ValueError(f"--batch {batch} does not divide over {share[1]} hosts")
    return Loader(Samples(folder, index, schedule, batch, cfg), batch, share)
