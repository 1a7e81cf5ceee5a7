"""The endless stream of training samples, by grain.

Each bucket has a stream of its own: its clips shuffled anew every epoch, none dropped. Batches take
from these streams by a schedule in which every run of B samples shares one bucket, buckets as often
as they have clips. Sample e, and so batch e // B, is the same whatever the number of threads,
processes and hosts: a stream that is stopped goes on exactly where it was, also on other hosts.

The section is chosen with the sample, before it is decided which host reads it. So is the record
that takes the place of one that cannot be read.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grain
import jax
import numpy as np
from absl import flags

from framepack_jax import packing
from framepack_jax.bundle import BundleError, Manifest
from framepack_jax.conditioning import MAX_PROMPT_TOKENS
from framepack_jax.data import checks, pixel_batch, records
from framepack_jax.data.batch import LOST, Batch, Conditions, Meta
from framepack_jax.data.pixel_batch import PixelBatch
from framepack_jax.data.records import BFLOAT16, DatasetError, Index, Record, VideoSource
from framepack_jax.packing import Section, Timeline
from framepack_jax.utils.compare import differences, differing_fields
from framepack_jax.utils.messages import shorten
from framepack_jax.video import read_span

FORMAT = 1
# Seeds of buckets are as far apart: grain adds the epoch to them.
SEED_STEP = 1_000_003
# Numbers of held-out samples, beyond those of any run.
HELD_OUT = 1 << 30
# Beside the seed of the data, so that windows do not depend on what else is drawn.
WINDOW_SEED = 2504
REPLACEMENT_SEED = 16265
# Records that are tried in the place of one that cannot be read; if none of them can, the dataset
# is gone rather than damaged.
TRIES = 16
# (height, width) of frames that are decoded only to see whether they can be.
DECODED = (8, 8)
# Reading a record or its video raises one of these.
READ_ERRORS = (ValueError, OSError, RuntimeError)
LEAST = {"holdout": 0, "threads": 1, "buffer": 1, "workers": 0, "max_bad_records": 0}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run."""

    path: str = ""
    """Folder of the dataset, made by framepack prepare."""
    seed: int = 0
    """Of the order of clips and of the choice of sections."""
    holdout: int = 0
    """Clips that are kept for validation: whole videos, chosen by their names, until there are so
    many."""
    caption_dropout: float = 0.0
    """Share of samples whose caption is replaced by the empty prompt."""
    sections: Literal["whole", "random"] = "whole"
    """A clip as long as it is, or cut to a random number of sections first."""
    windows: tuple[int, ...] = ()
    """Latent windows that the sections of a batch are drawn from, evenly; default: the schedule's,
    which validation has in any case."""
    text_tokens: int = MAX_PROMPT_TOKENS
    """Tokens that captions are filled up to; fewer, where all captions are short, save work and
    change nothing else."""
    threads: int = 4
    """Threads that read; more than 4 gain nothing for latents."""
    buffer: int = 16
    """Samples read ahead (the default of grain, 500, is 23 GB of latents)."""
    workers: int = 0
    """Processes that read; only decoding raw videos gains from them."""
    max_bad_records: int = 10
    """Clips that may turn out to be unreadable in training: each is named and another clip of its
    bucket takes its place. One more ends the run with a checkpoint."""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                f"--data.caption-dropout {self.caption_dropout}: expected a share from 0 to 1"
            )
        if not 1 <= self.text_tokens <= MAX_PROMPT_TOKENS:
            raise ValueError(
                f"--data.text-tokens {self.text_tokens}: expected 1 to {MAX_PROMPT_TOKENS}"
            )
        if any(window < 1 for window in self.windows):
            raise ValueError(f"--data.windows {self.windows}: expected latent frames, 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--data.seed {self.seed}: expected a whole number from 0 to 2^32 - 1")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ValueError(f"--data.{flag} {getattr(self, name)}: expected {least} or more")


def choose_section(
    rng: np.random.Generator, schedule: str, order: str, length: int, random_length: bool
) -> tuple[Section, int, int]:
    """(section, its number in the order of making, sections of its plan) for a clip of `length`
    latent frames, whose first stands for the start image."""
    most = (length - 1) // packing.parse(schedule).window
    sections = int(rng.integers(1, most + 1)) if random_length else most
    number = int(rng.integers(sections))
    return _plan(schedule, order, sections)[number], number, sections


@functools.lru_cache(maxsize=4096)
def _plan(schedule: str, order: str, sections: int) -> list[Section]:
    return packing.plan(schedule, order, sections)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Number of a record -> a sample, for grain, from any process."""

    folder: Path
    index: Index
    schedule: str
    order: str
    batch: int
    cfg: DataConfig

    @functools.cached_property
    def schedules(self) -> tuple[str, ...]:
        """That of the run, or those with the windows that batches are drawn from."""
        run = packing.parse(self.schedule)
        windows = sorted(set(self.cfg.windows)) or [run.window]
        return tuple(str(run.with_window(window)) for window in windows)

    def schedule_of(self, step: int) -> str:
        """The schedule of a batch."""
        draw = np.random.default_rng([self.cfg.seed, WINDOW_SEED, step])
        return self.schedules[draw.integers(len(self.schedules))]

    @functools.cached_property
    def source(self) -> VideoSource:
        return VideoSource(self.folder, self.index.shards)

    @functools.cached_property
    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        return records.read_empty(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to other processes.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def streams(self) -> dict[tuple[int, int], list[int]]:
        """Numbers of the records to train on, by bucket."""
        places, found = _places(self.index), {}
        for number in split(self.index, self.cfg.holdout)[0]:
            found.setdefault(places[number], []).append(number)
        return dict(sorted(found.items()))

    def training(self, element: int, number: int) -> Batch | PixelBatch:
        """The sample that is `element` of the stream, of record `number`; no batch axis."""
        return self.read_or_replace(element, number, self.schedule_of(element // self.batch))

    def read_or_replace(self, element: int, number: int, schedule: str) -> Batch | PixelBatch:
        """`read`, or the sample of another record of the bucket if that one cannot be read; which
        one comes from `element` alone. Raises DatasetError if none of up to TRIES others can be
        read."""
        try:
            return self.read(element, number, schedule)
        except READ_ERRORS as error:
            first = error
        rng = np.random.default_rng([self.cfg.seed, REPLACEMENT_SEED, element])
        bucket = _places(self.index)[number]
        shuffled = rng.permutation(self.streams[bucket]).tolist()
        others = [other for other in shuffled if other != number][:TRIES]
        for other in others:
            with contextlib.suppress(*READ_ERRORS):
                sample = self.read(element, other, schedule)
                clip = np.asarray(-1 - number, np.int32)
                return sample.replace(meta=sample.meta.replace(clip=clip))
        height, width = bucket
        tried = f"nor can {len(others)} others" if others else "it is the only clip"
        raise DatasetError(
            f"{first}; {tried} of bucket {height}x{width}, which has nothing to train on. Mend a"
            " clip of this bucket, or prepare the dataset again without its videos"
        ) from first

    def read(self, element: int, number: int, schedule: str) -> Batch | PixelBatch:
        """A sample of a schedule; all that is random in it comes from `element`."""
        rng = np.random.default_rng([self.cfg.seed, element])
        record = self.source[number]
        section, made, sections = choose_section(
            rng, schedule, self.order, self.length(record), self.cfg.sections == "random"
        )
        if rng.random() < self.cfg.caption_dropout:
            text, pooled = self.empty
            record = record._replace(text=text, pooled=pooled)
        conditions = conditions_of(record, self.cfg.text_tokens)
        meta = make_meta(element, made, sections, number)
        if self.index.mode == "latents":
            return latent_sample(record, section, conditions, meta)
        span = packing.span(schedule, self.order)
        return self._pixel_sample(record, section, span, conditions, meta)

    def read_video(self, number: int) -> None:
        """Decode all frames of a clip where the dataset keeps none, as small pictures. Raises one
        of READ_ERRORS."""
        if self.index.mode == "pixels":
            clip = self.source[number].clip
            first = round(clip.start * self.index.fps)
            read_span(self.folder / clip.source, self.index.fps, first, clip.frames, DECODED)

    def length(self, record: Record) -> int:
        """Latent frames of a clip."""
        return 1 + (record.clip.frames - 1) // self.index.time_compression

    def _pixel_sample(
        self, record: Record, section: Section, span: int, conditions: Conditions, meta: Meta
    ) -> PixelBatch:
        clip = record.clip
        window = pixel_batch.window_of(section, self.length(record), span)
        offset = round(clip.start * self.index.fps)
        first, count = window.frames(self.index.time_compression)
        path = self.folder / clip.source  # an absolute path stays itself
        size = clip.height, clip.width
        # Of a clip shorter than the window, what lies past its end is not read.
        there = min(count, clip.frames - first)
        frames = read_span(path, self.index.fps, offset + first, there, size)
        frames = np.concatenate([frames, np.repeat(frames[-1:], count - there, axis=0)])
        return PixelBatch(
            start_frame=frames[:1]
            if first == 0
            else read_span(path, self.index.fps, offset, 1, size),
            frames=frames,
            target_at=pixel_batch.rows(section.targets, window),
            reads_at=tuple(pixel_batch.rows(group.reads, window) for group in section.groups),
            indices=tuple(np.asarray(group.indices, np.int32) for group in section.groups),
            target_indices=np.asarray(section.indices, np.int32),
            kernels=tuple(group.kernel for group in section.groups),
            conditions=conditions,
            meta=meta,
        )


def latent_sample(record: Record, section: Section, conditions: Conditions, meta: Meta) -> Batch:
    """Cut the sample of a section out of a clip, without batch axis, as sampling reads its
    timeline."""
    timeline = Timeline.of(record.latents[None])
    target, context = timeline.read(section.targets), packing.read_context(section, timeline)
    target, context = jax.tree.map(lambda x: x[0], (target, context))
    return Batch(target, context, conditions, meta)


def make_meta(element: int, section: int, sections: int, clip: int) -> Meta:
    """Return the numbers of a sample, without batch axis."""
    return Meta(*(np.asarray(x, np.int32) for x in (element, section, sections, clip)))


def conditions_of(record: Record, tokens: int = MAX_PROMPT_TOKENS) -> Conditions:
    """Return the conditions of a clip, without batch axis, the text padded with zeros to `tokens`
    rows. Raises DatasetError if the text is longer."""
    count, width = record.text.shape
    if count > tokens:
        raise DatasetError(
            f"clip {record.clip.id} has a caption of {count} tokens, more than --data.text-tokens"
            f" {tokens}; give {count} or more"
        )
    text = np.zeros((tokens, width), BFLOAT16)
    text[:count] = record.text
    valid = np.arange(tokens) < count
    return Conditions(text, valid, record.pooled, record.image)


class BucketSchedule(grain.transforms.DatasetSelectionMap):
    """Element of the stream -> (bucket, element of the bucket's own stream).

    A cycle has as many batches as there are clips, and of each bucket as many as that has clips,
    shuffled anew for each cycle.
    """

    def __init__(self, counts: Sequence[int], batch: int, seed: int) -> None:
        self.counts, self.batch, self.seed = tuple(counts), batch, seed

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, element: int) -> tuple[int, int]:
        step, place = divmod(int(element), self.batch)
        bucket, number = self.of_step(step)
        return bucket, number * self.batch + place

    def of_step(self, step: int) -> tuple[int, int]:
        """(bucket, which of the bucket's batches) of a batch."""
        cycle, place = divmod(step, sum(self.counts))
        buckets, numbers = _cycle(self.counts, self.seed, cycle)
        bucket = int(buckets[place])
        return bucket, cycle * self.counts[bucket] + int(numbers[place])


@functools.lru_cache(maxsize=4)
def _cycle(counts: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each batch of a cycle the bucket, and which of that bucket's batches it is."""
    buckets = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng([seed, cycle]).shuffle(buckets)
    numbers = np.empty(len(buckets), np.int64)
    for bucket, count in enumerate(counts):
        numbers[buckets == bucket] = np.arange(count)
    return buckets, numbers


class HeldOut(NamedTuple):
    """This host's share of a batch of held-out samples, and of one of the same shapes whose
    samples are of other clips; None where the bucket has one clip alone. `size` is that of the
    whole batch."""

    batch: Batch | PixelBatch
    others: Batch | PixelBatch | None
    size: int


class Loader:
    """Batches for ever; `share` (index, count) of each is read here. Built by `open_loader`."""

    def __init__(self, samples: Samples, batch: int, share: tuple[int, int]) -> None:
        self.samples, self.batch, self.share = samples, batch, share
        self.index, self.cfg = samples.index, samples.cfg
        self.held = split(self.index, self.cfg.holdout)[1]
        self.streams = samples.streams
        self.buckets = list(self.streams)
        counts = [len(self.streams[bucket]) for bucket in self.buckets]
        self.schedule = BucketSchedule(counts, batch, self.cfg.seed)
        self._abstract: dict[Any, Any] = {}
        self._iterator = self._open()

    def _open(self) -> Any:
        streams = [
            grain.MapDataset.source(self.streams[bucket])
            .seed(self.cfg.seed + SEED_STEP * (1 + number))
            .shuffle()
            .repeat()
            for number, bucket in enumerate(self.buckets)
        ]
        stream = grain.MapDataset.select_from_datasets(streams, self.schedule)
        stream = stream.map_with_index(self.samples.training)
        workers = None
        if self.cfg.workers:
            # grain reads flags of its own, which nobody parses outside of an absl app.
            flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(self.cfg.workers, per_worker_buffer_size=1)
        index, count = self.share
        read = grain.ReadOptions(self.cfg.threads, self.cfg.buffer)
        return iter(
            grain.experimental.ElasticIterator(
                stream, self.batch, grain.sharding.ShardOptions(index, count, drop_remainder=True),
                read_options=read, multiprocessing_options=workers,
            )
        )  # fmt: skip

    def __iter__(self) -> Iterator[Batch | PixelBatch]:
        return self

    def __next__(self) -> Batch | PixelBatch:
        """The share of the next batch. Raises DatasetError if hardly any record can be read."""
        return next(self._iterator)

    def blank(self, ahead: int) -> Batch | PixelBatch:
        """The share of the batch that comes `ahead` batches after the next, as it is where batches
        cannot be read: its clips are LOST, and its loss is not finite, so that no update is made of
        it."""
        step, share = self.step + ahead, self.batch // self.share[1]

        def empty(x: jax.ShapeDtypeStruct) -> np.ndarray:
            return np.zeros((share, *x.shape[1:]), x.dtype)

        shapes = self.abstract(self.bucket_at(step), self.samples.schedule_of(step))
        batch = jax.tree.map(empty, shapes)
        pooled = np.full_like(batch.conditions.pooled, np.nan)
        return batch.replace(
            conditions=batch.conditions.replace(pooled=pooled),
            meta=batch.meta.replace(clip=np.full_like(batch.meta.clip, LOST)),
        )

    def get_state(self) -> dict[str, Any]:
        """Where the stream is, the same on every host."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where a stream was."""
        self._iterator.set_state(state)

    @property
    def step(self) -> int:
        """Number of the batch that comes next, from 0."""
        return self.get_state()["global_next_index"] // self.batch

    def bucket_at(self, step: int) -> tuple[int, int]:
        """The bucket of a batch, without reading it."""
        return self.buckets[self.schedule.of_step(step)[0]]

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides the order of samples, and the samples."""
        return {
            "format": FORMAT,
            "clips": {f"{h}x{w}": len(self.streams[h, w]) for h, w in self.buckets},
            "batch": self.batch,
            "schedule": self.samples.schedule,
            "windows": list(self.cfg.windows),
            "order": self.samples.order,
            "seed": self.cfg.seed,
            "holdout": self.cfg.holdout,
            "sections": self.cfg.sections,
            "caption_dropout": self.cfg.caption_dropout,
            "mode": self.index.mode,
            "records": repr(self.samples.source),
            **{f"made by {name}": value for name, value in self.index.fingerprint.items()},
        }

    def latent_size(self, bucket: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a bucket's latents."""
        return tuple(side // self.index.space_compression for side in bucket)

    def abstract(self, bucket: tuple[int, int], schedule: str) -> Batch | PixelBatch:
        """A global batch of a bucket and a schedule as `jax.ShapeDtypeStruct`s."""
        if (bucket, schedule) not in self._abstract:
            sample = self.samples.read_or_replace(0, self.streams[bucket][0], schedule)
            self._abstract[bucket, schedule] = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((self.batch, *np.shape(x)), np.asarray(x).dtype),
                sample,
            )
        return self._abstract[bucket, schedule]

    def check_buckets(self) -> None:
        """Raise DatasetError that names a bucket if no clip of it can be read."""
        for bucket, schedule in itertools.product(self.buckets, self.samples.schedules):
            self.abstract(bucket, schedule)

    def clip_ids(self, numbers: Sequence[int]) -> list[str]:
        """Names of clips by their numbers; of those that cannot be read, where they lie."""
        return [self._named(int(number)) for number in numbers]

    def _named(self, number: int) -> str:
        with contextlib.suppress(*READ_ERRORS):
            return self.samples.source[number].clip.id
        return self.samples.source.place(number)

    def fault(self, number: int) -> str | None:
        """Return why a record, or any frame of its clip, cannot be read; None if all can."""
        try:
            self.samples.read(0, number, self.samples.schedule)
            self.samples.read_video(number)
        except READ_ERRORS as error:
            return str(error)
        return None

    def held_out(self, count: int, most: int, ways: int = 1) -> list[HeldOut]:
        """`count` held-out samples and at least one of every held-out clip, always the same; by
        bucket, in batches of at most `most` samples that divide by `ways`. A batch is filled up
        with samples that it has already: `element` tells them."""
        places = _places(self.index)
        by_bucket: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for e in range(max(count, len(self.held)) if self.held else 0):
            number = self.held[e % len(self.held)]
            by_bucket.setdefault(places[number], []).append((HELD_OUT + e, number))
        batches = []
        for bucket, samples in sorted(by_bucket.items()):
            held = list(dict.fromkeys(number for _, number in samples))
            clips = held if len(held) > 1 else held + self.streams.get(bucket, [])[:1]
            after = dict(zip(clips, clips[1:] + clips[:1], strict=True))
            size = min(most, -(-len(samples) // ways) * ways)
            for first in range(0, len(samples), size):
                whole = samples[first : first + size]
                whole += whole[-1:] * (size - len(whole))
                mine = whole[self.share[0] :: self.share[1]]
                batch = self._stacked(mine)
                others = [(element, after[number]) for element, number in mine]
                other = self._stacked(others) if len(clips) > 1 else None
                batches.append(HeldOut(batch, other, size))
        return batches

    def _stacked(self, samples: Sequence[tuple[int, int]]) -> Batch | PixelBatch:
        """(element, number of the record) -> a batch."""
        schedule = self.samples.schedule
        read = [self.samples.read(element, number, schedule) for element, number in samples]
        return jax.tree.map(lambda *x: np.stack(x), *read)

    def held_out_records(self, count: int) -> list[Record]:
        """Held-out clips, the same on every host, of as many videos as there are."""
        return [self.samples.source[number] for number in self.held[:count]]


def open_loader(
    cfg: DataConfig, schedule: str, order: str, batch: int, share: tuple[int, int] = (0, 1)
) -> Loader:
    """The stream of a dataset for a packing schedule, in batches of `batch` samples of which this
    host reads its share (index, count). Raises DatasetError, ScheduleError, ValueError."""
    folder = Path(cfg.path)
    index = records.read_index(folder)
    checks.check_lengths(folder, index, max(packing.parse(schedule).window, *cfg.windows, 1))
    _check_holdout(folder, index, cfg.holdout)
    if cfg.text_tokens < MAX_PROMPT_TOKENS:
        empty = len(records.read_empty(folder)[0]) if cfg.caption_dropout else 0
        checks.check_captions(folder, index, cfg.text_tokens, empty)
    checks.check_sources(folder, index)
    packing.plan(schedule, order, 1)
    if batch % share[1]:
        raise ValueError(f"--batch {batch} does not divide over {share[1]} hosts")
    return Loader(Samples(folder, index, schedule, order, batch, cfg), batch, share)


def split(index: Index, holdout: int) -> tuple[list[int], list[int]]:
    """Numbers of the records to train on, and of at least `holdout` others: all of some videos,
    those whose names' digests come first, so that a dataset that grows keeps most of them. They
    are ordered to begin with one clip of each video."""
    videos: dict[str, list[int]] = {}
    for number, video in enumerate(v for shard in index.shards for v in shard.videos):
        videos.setdefault(video, []).append(number)
    held: list[tuple[int, str, int]] = []
    for video in sorted(videos):
        if len(held) >= holdout:
            break
        held += [(turn, video, number) for turn, number in enumerate(videos.pop(video))]
    return sorted(itertools.chain(*videos.values())), [number for *_, number in sorted(held)]


def _places(index: Index) -> list[tuple[int, int]]:
    """The bucket of each record."""
    return [(s.height, s.width) for s in index.shards for _ in s.lengths]


def _check_holdout(folder: Path, index: Index, holdout: int) -> None:
    """Raise DatasetError if nothing is left to train on."""
    if split(index, holdout)[0]:
        return
    videos = collections.Counter(video for shard in index.shards for video in shard.videos)
    # The last one to be held out.
    most = index.clips - videos[max(videos)]
    raise DatasetError(
        f"--data.holdout {holdout} leaves nothing of the {index.clips} clips of {len(videos)}"
        f" videos in {folder} to train on, as whole videos are held out; give --data.holdout"
        f" {most}{' or less' if most else ''}"
    )


def check_fingerprint(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise DatasetError where a run was begun with another order of samples."""
    if differing := differences(old, new, old | new):
        listed = shorten(differing, separator="; ")
        raise DatasetError(
            f"the samples are not those that the run was begun with ({listed}); put them back, or"
            " begin another run from its parameters, in a new order: --init RUN@STEP --output NEW"
        )


def check_bundle(index: Index, manifest: Manifest) -> None:
    """Raise DatasetError where a dataset was made by other networks than a bundle has, BundleError
    where the bundle lacks them."""
    there, here = index.fingerprint, made_by(manifest, index.mode)
    differing = differing_fields(there, here, [name for name in here if name in there])
    if differing:
        raise DatasetError(
            f"the dataset was made by another bundle: {', '.join(differing)} differ; train with the"
            " bundle that it was prepared with, or prepare it again with this one"
        )


def made_by(manifest: Manifest, mode: str) -> dict[str, Any]:
    """What of a bundle decides the numbers of a dataset. Raises BundleError where it lacks some of
    the networks."""
    roles = ["text_encoder", "text_encoder_2", "image_encoder"]
    roles += ["vae"] if mode == "latents" else []
    if lacking := [role for role in roles if role not in manifest.roles]:
        raise BundleError(
            f"the bundle has no {', '.join(lacking)}, which made the dataset; give the bundle that"
            " it was prepared with"
        )
    return {
        **{role: manifest.roles[role].source.get("sha256") for role in roles},
        "prompt_template": manifest.prompt_template,
        "latent_mean": list(manifest.latent_mean),
        "latent_std": list(manifest.latent_std),
    }
