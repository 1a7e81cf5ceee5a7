"""The endless stream of training samples, by Grain.

Each bucket of each dataset has its own stream: its clips, reshuffled every epoch, none dropped.
Batches take samples from these streams by `BucketSchedule`. Sample e, and so batch e // B, is the
same for any number of threads, processes and hosts. An interrupted stream resumes exactly at its
position, also on another number of hosts.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from framepack_jax import packing
from framepack_jax.data import holdout
from framepack_jax.data.batch import LOST, Batch
from framepack_jax.data.bucket_schedule import BucketSchedule, whole_weights
from framepack_jax.data.config import DataConfig
from framepack_jax.data.datasets import open_datasets
from framepack_jax.data.pixel_batch import PixelBatch
from framepack_jax.data.records import BFLOAT16, Record
from framepack_jax.data.samples import READ_ERRORS, Samples, cuts_clips
from framepack_jax.data.stream import POSITION, BatchStream

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
        self.datasets, self.cfg = samples.datasets, samples.cfg
        self.streams = _joined([dataset.streams for dataset in self.datasets])
        self.buckets = list(self.streams)
        # Clips of the datasets in turn, so that the first of them are of all.
        turns = itertools.zip_longest(*(dataset.held for dataset in self.datasets))
        self.held = [number for turn in turns for number in turn if number is not None]
        # Without weights, all clips are drawn equally often.
        weights = self.cfg.weights or [dataset.clips for dataset in self.datasets]
        counts = [list(map(len, dataset.streams.values())) for dataset in self.datasets]
        self.schedule = BucketSchedule(counts, whole_weights(weights), batch, self.cfg.seed)
        self._abstract: dict[Any, Batch | PixelBatch] = {}
        self._iterator = self._open()

    @property
    def _streams(self) -> list[tuple[tuple[int, int], list[int]]]:
        """Bucket and numbers of the records of each stream, dataset by dataset."""
        return [stream for dataset in self.datasets for stream in dataset.streams.items()]

    def _open(self) -> BatchStream:
        streams = [
            grain.MapDataset.source(numbers)
            .seed(self.cfg.seed + SEED_STEP * (1 + number))
            .shuffle()
            .repeat()
            for number, (_, numbers) in enumerate(self._streams)
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

        kind = self.samples.schedule_of(step), self.samples.frames_of(step)
        shapes = self.abstract(self.bucket_at(step), *kind)
        batch = jax.tree.map(zeros, shapes)
        return batch.replace(
            conditions=jax.tree.map(_not_a_number, batch.conditions),
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
        return self._streams[self.schedule.of_step(step)[0]][0]

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Every setting that determines the samples and their order."""
        facts = {
            "format": FORMAT,
            "clips": {f"{h}x{w}": len(numbers) for (h, w), numbers in self.streams.items()},
            "batch": self.batch,
            "schedule": str(self.samples.schedule),
            "windows": list(self.cfg.windows),
            "order": self.samples.schedule.order,
            "seed": self.cfg.seed,
            "holdout": self.cfg.holdout,
            "sections": "random" if cuts_clips(self.cfg, self.samples.schedule) else "whole",
            "caption_dropout": self.cfg.caption_dropout,
            "mode": self.mode,
        }
        # Runs of earlier versions have none of these.
        newer = {
            "image_dropout": self.cfg.image_dropout,
            "empty_start": self.cfg.empty_start,
            "section_weights": list(self.cfg.section_weights),
        }
        if self.samples.schedule.importance:
            newer |= {"estimate": self.cfg.estimate, "estimate_noise": self.cfg.estimate_noise}
        facts |= {name: value for name, value in newer.items() if value}
        if len(self.datasets) == 1:
            return facts | dict(self.datasets[0].facts())
        facts["weights"] = list(self.schedule.weights)
        for place, dataset in enumerate(self.datasets, 1):
            facts |= {f"dataset {place}: {name}": value for name, value in dataset.facts()}
        return facts

    @property
    def mode(self) -> str:
        """latents or pixels, as all datasets."""
        return self.datasets[0].index.mode

    def latent_size(self, bucket: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the latents of a bucket."""
        height, width = bucket
        compression = self.datasets[0].index.space_compression
        return height // compression, width // compression

    def abstract(
        self, bucket: tuple[int, int], schedule: packing.Schedule, frames: int | None = None
    ) -> Batch | PixelBatch:
        """Return a global batch of a bucket, a schedule and a number of target frames (by default a
        latent window) as `jax.ShapeDtypeStruct`s."""
        key = bucket, schedule, frames or schedule.window
        if key not in self._abstract:
            first = self.streams[bucket][0]
            sample = self.samples.read_or_replace(0, first, schedule, frames)
            self._abstract[key] = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((self.batch, *np.shape(x)), np.asarray(x).dtype),
                sample,
            )
        return self._abstract[key]

    def check_buckets(self) -> None:
        """Raise DatasetError that names a bucket if none of its clips can be read."""
        for bucket, kind in itertools.product(self.buckets, self.samples.kinds):
            self.abstract(bucket, *kind)

    def clip_ids(self, numbers: Sequence[int]) -> list[str]:
        """Return the names of records; the file and place of an unreadable one."""
        return [self._name(int(number)) for number in numbers]

    def _name(self, number: int) -> str:
        dataset = self.samples.dataset_of(number)
        with contextlib.suppress(*READ_ERRORS):
            return dataset.record(number).clip.id
        return dataset.place(number)

    def fault(self, number: int) -> str | None:
        """Return why a record, or any frame of its clip, is unreadable; None if all is readable."""
        try:
            self.samples.read(0, number, self.samples.schedule)
            self.samples.read_video(number)
        except READ_ERRORS as error:
            return str(error)
        return None

    def held_out(self, count: int, max_size: int, ways: int = 1) -> list[HeldOut]:
        """Return the validation batches of `holdout.batches`, the same at every call. Batches take
        turns in the number of latent frames that they make, if passes have several."""
        buckets = [bucket for dataset in self.datasets for bucket in dataset.index.record_buckets]
        plan = holdout.batches(self.held, buckets, self.streams, count, max_size, ways)
        turns = itertools.cycle(packing.pass_frames(self.samples.schedule))
        return [
            HeldOut(
                self._stacked(batch.samples, frames),
                None if batch.others is None else self._stacked(batch.others, frames),
                len(batch.samples),
            )
            for batch, frames in zip(plan, turns, strict=False)
        ]

    def _stacked(self, samples: Sequence[tuple[int, int]], frames: int) -> Batch | PixelBatch:
        """Read the share of this host in samples (element, number of the record)."""
        index, count = self.share
        schedule = self.samples.schedule
        read = [self.samples.read(*sample, schedule, frames) for sample in samples[index::count]]
        return jax.tree.map(lambda *x: np.stack(x), *read)

    def held_out_records(self, count: int) -> list[Record]:
        """Return held-out clips, the same on every host, from as many videos as there are."""
        return [self.samples.dataset_of(n).record(n) for n in self.held[:count]]


def _not_a_number(x: np.ndarray) -> np.ndarray:
    """Return NaN in the place of numbers; flags stay."""
    return np.full_like(x, np.nan) if x.dtype == BFLOAT16 else x


def _joined(
    streams: Sequence[Mapping[tuple[int, int], list[int]]],
) -> dict[tuple[int, int], list[int]]:
    """Return the numbers of the records of all datasets by bucket."""
    buckets = sorted({bucket for each in streams for bucket in each})
    return {b: [number for each in streams for number in each.get(b, [])] for b in buckets}


def open_loader(
    cfg: DataConfig, schedule: packing.Schedule, batch: int, share: tuple[int, int] = (0, 1)
) -> Loader:
    """Open the stream of the datasets of a run for a packing schedule.

    `batch` is the size of a global batch; this host reads its `share` (index, count). Raises
    DatasetError, ScheduleError, ValueError.
    """
    packing.plan(schedule, 1)
    given = packing.start_frames(schedule)
    # A clip of three sections has passes of every length.
    sections = 3 if len(packing.pass_frames(schedule)) > 1 else 1
    datasets = open_datasets(cfg, {*cfg.windows} | {schedule.window}, given, sections)
    if datasets[0].index.mode == "pixels" and not packing.reads_nearby(schedule):
        raise packing.ScheduleError(
            f"schedule {schedule} in order {schedule.order!r} reads frames far from a section, and"
            " datasets of mode pixels hold only those nearby; prepare the dataset with --mode"
            " latents"
        )
    _check_empty_start(cfg, schedule, chunked=any(d.index.chunk for d in datasets))
    if batch % share[1]:
        raise ValueError(f"--batch {batch} does not divide over {share[1]} hosts")
    return Loader(Samples(datasets, schedule, batch, cfg), batch, share)


def _check_empty_start(cfg: DataConfig, schedule: packing.Schedule, chunked: bool) -> None:
    """Raise ValueError if videos cannot start empty, or always do."""
    if not cfg.empty_start:
        return
    flag = f"--data.empty-start {cfg.empty_start:g}"
    if schedule.order != "forward":
        raise ValueError(
            f"{flag}: sections in order {schedule.order!r} read a start image; remove the flag, or"
            f" give a --schedule in forward order, as {packing.RELEASED_F1}"
        )
    if chunked:
        raise ValueError(
            f"{flag}: the dataset is of a bundle whose videos start with nothing known anyway;"
            " remove the flag. --history.drop-all sets how often all context is missing"
        )
