"""Read a training sample: one section of one clip.

Every random draw of a sample is seeded by its number in the stream, the element. Its section, and
the record that replaces an unreadable one, do not depend on the host that reads the sample.
"""

import bisect
import contextlib
import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np

from framepack_jax import packing
from framepack_jax.data import pixel_batch
from framepack_jax.data.batch import Batch, Conditions, Meta
from framepack_jax.data.config import DataConfig
from framepack_jax.data.datasets import Dataset
from framepack_jax.data.holdout import FIRST_ELEMENT
from framepack_jax.data.pixel_batch import PixelBatch
from framepack_jax.data.records import BFLOAT16, Clip, DatasetError, Record
from framepack_jax.models.sizes import MAX_PROMPT_TOKENS
from framepack_jax.packing import Section, Timeline
from framepack_jax.video import read_span

# Seeds beside that of the data: these draws do not depend on the others.
WINDOW_SEED = 2504
REPLACEMENT_SEED = 16265
PASS_SEED = 2405
# Share of batches of the first pass of an endpoint order, which makes two sections.
FIRST_PASSES = 1 / 3
MAX_TRIES = 16
"""Records to try in place of an unreadable one, before the whole bucket counts as unreadable."""
CHECK_SIZE = (8, 8)
"""(height, width) of frames that are decoded only to check that they are readable."""
READ_ERRORS = (ValueError, OSError, RuntimeError)
"""Exceptions that reading a record or its video raises."""


class Choice(NamedTuple):
    """A section of a clip, its number in order of generation, the number of sections of its plan,
    and the number of latent frames that are given before them."""

    section: Section
    number: int
    sections: int
    before: int


def choose_section(
    rng: np.random.Generator,
    schedule: packing.Schedule,
    length: int,
    cfg: DataConfig,
    chunked: bool = False,
    frames: int | None = None,
) -> Choice:
    """Draw a section of a clip of `length` latent frames, which begins with the start image of the
    schedule. It is a pass that makes `frames` latents, by default a latent window.

    If a clip is encoded in chunks (`chunked`), or by `cfg.empty_start`, sections are planned as
    those of a video that starts with nothing known. Under a schedule without context each chunk is
    a video of its own; of a clip that is encoded at once, the beginning is the only one.
    """
    empty = chunked or (cfg.empty_start > 0 and rng.random() < cfg.empty_start)
    before = 0 if empty else packing.start_frames(schedule)
    most = (length - before) // schedule.window
    if not schedule.segments:
        chunk = int(rng.integers(most)) if chunked else 0
        return Choice(_plan(schedule, 1, chunk * schedule.window, chunked)[0], 0, 1, before)
    frames = frames or schedule.window
    counts = [n for n in range(1, most + 1) if frames in packing.pass_frames(schedule, n)]
    sections = counts[rng.integers(len(counts))] if cuts_clips(cfg, schedule) else counts[-1]
    plan = _plan(schedule, sections, before, chunked)
    numbers = [i for i, section in enumerate(plan) if len(section.targets) == frames]
    if cfg.section_weights:
        last = len(cfg.section_weights) - 1
        weights = np.asarray([cfg.section_weights[min(i, last)] for i in numbers])
        number = numbers[rng.choice(len(numbers), p=weights / weights.sum())]
    else:
        number = numbers[rng.integers(len(numbers))]
    return Choice(plan[number], number, sections, before)


def cuts_clips(cfg: DataConfig, schedule: packing.Schedule) -> bool:
    """Return whether clips are cut to random lengths; a forward section does not depend on them."""
    return cfg.sections == "random" and schedule.order != "forward"


@functools.lru_cache(maxsize=4096)
def _plan(schedule: packing.Schedule, sections: int, before: int, alone: bool) -> list[Section]:
    return packing.plan(schedule, sections, before=before, alone=alone)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Read samples of datasets by the number of their record, from any thread or process."""

    datasets: tuple[Dataset, ...]
    schedule: packing.Schedule
    batch: int
    cfg: DataConfig

    @functools.cached_property
    def schedules(self) -> tuple[packing.Schedule, ...]:
        """Schedules that batches are drawn from: that of the run with each of the windows."""
        windows = sorted(set(self.cfg.windows)) or [self.schedule.window]
        return tuple(self.schedule.with_window(window) for window in windows)

    def schedule_of(self, step: int) -> packing.Schedule:
        """Return the schedule of a batch."""
        draw = np.random.default_rng([self.cfg.seed, WINDOW_SEED, step])
        return self.schedules[draw.integers(len(self.schedules))]

    @functools.cached_property
    def kinds(self) -> tuple[tuple[packing.Schedule, int], ...]:
        """Schedules of batches, with the number of latent frames that their passes make."""
        return tuple((s, frames) for s in self.schedules for frames in packing.pass_frames(s))

    def frames_of(self, step: int) -> int:
        """Return the number of latent frames that the passes of a batch make."""
        one, *two = packing.pass_frames(self.schedule_of(step))
        draw = np.random.default_rng([self.cfg.seed, PASS_SEED, step])
        return two[0] if two and draw.random() < FIRST_PASSES else one

    def dataset_of(self, number: int) -> Dataset:
        """Return the dataset of a record."""
        return self.datasets[bisect.bisect(self.datasets, number, key=lambda d: d.first) - 1]

    def training(self, element: int, number: int) -> Batch | PixelBatch:
        """Return sample `element` of the stream, from record `number`, without batch axis.

        Random draws repeat after FIRST_ELEMENT samples, those of held-out samples follow."""
        step = element // self.batch
        kind = self.schedule_of(step), self.frames_of(step)
        return self.read_or_replace(element % FIRST_ELEMENT, number, *kind)

    def read_or_replace(
        self, element: int, number: int, schedule: packing.Schedule, frames: int | None = None
    ) -> Batch | PixelBatch:
        """Return `read`, or the sample of another record of the bucket if that one is unreadable.

        `element` alone decides which record replaces it. Raises DatasetError if none of up to
        `MAX_TRIES` others can be read.
        """
        try:
            return self.read(element, number, schedule, frames)
        except READ_ERRORS as error:
            first = error
        others = self._replacements(element, number)
        for other in others:
            with contextlib.suppress(*READ_ERRORS):
                sample = self.read(element, other, schedule, frames)
                clip = np.asarray(-1 - number, np.int32)
                meta = dataclasses.replace(sample.meta, clip=clip)
                return dataclasses.replace(sample, meta=meta)
        height, width = self.dataset_of(number).bucket(number)
        tried = f"nor can {len(others)} others" if others else "it is the only clip"
        raise DatasetError(
            f"{first}; {tried} of bucket {height}x{width}, which has nothing to train on. Repair a"
            " clip of this bucket, or prepare the dataset again without its videos"
        ) from first

    def _replacements(self, element: int, number: int) -> list[int]:
        rng = np.random.default_rng([self.cfg.seed, REPLACEMENT_SEED, element])
        dataset = self.dataset_of(number)
        shuffled = rng.permutation(dataset.streams[dataset.bucket(number)]).tolist()
        return [other for other in shuffled if other != number][:MAX_TRIES]

    def read(
        self, element: int, number: int, schedule: packing.Schedule, frames: int | None = None
    ) -> Batch | PixelBatch:
        """Return the sample of a record under a schedule, of a pass that makes `frames` latents (by
        default a latent window); `element` seeds the random draws."""
        rng = np.random.default_rng([self.cfg.seed, element])
        dataset = self.dataset_of(number)
        record = dataset.record(number)
        cfg = self.cfg
        choice = choose_section(
            rng, schedule, dataset.length(record.clip), cfg, bool(dataset.index.chunk), frames
        )
        if rng.random() < cfg.caption_dropout:
            text, pooled = dataset.empty
            record = record._replace(text=text, pooled=pooled)
        from_text = cfg.empty_start > 0 and not choice.before
        if from_text or (cfg.image_dropout > 0 and rng.random() < cfg.image_dropout):
            record = record._replace(image=_blank(record.image))
        conditions = conditions_of(record, dataset.text_tokens)
        meta = make_meta(element, choice.number, choice.sections, number)
        if schedule.importance:
            fps = dataset.index.fps / dataset.index.time_compression
            choice = choice._replace(section=by_importance(rng, schedule, record, choice, cfg, fps))
        if dataset.index.mode == "latents":
            return latent_sample(record, choice.section, conditions, meta, choice.before)
        return pixel_sample(dataset, record.clip, choice, packing.span(schedule), conditions, meta)

    def read_video(self, number: int) -> None:
        """Decode all frames of a clip of a dataset of mode pixels, as small pictures. Raises one of
        READ_ERRORS."""
        dataset = self.dataset_of(number)
        if dataset.index.mode == "pixels":
            clip, fps = dataset.record(number).clip, dataset.index.fps
            read_span(dataset.video(clip), fps, round(clip.start * fps), clip.frames, CHECK_SIZE)


def by_importance(
    rng: np.random.Generator,
    schedule: packing.Schedule,
    record: Record,
    choice: Choice,
    cfg: DataConfig,
    fps: float,
) -> Section:
    """Return the section of a sample, its history ordered by importance. `fps` counts latents."""
    assert record.latents is not None, "a dataset of pixels is refused"
    timeline, first = Timeline.of(record.latents[None]), choice.section.targets[0]
    if not first:
        return choice.section
    if cfg.estimate == "last":
        estimate = timeline.read([first - 1])[:, 0]
    else:
        truth = timeline.read(choice.section.targets).mean(axis=1, dtype=np.float32)
        noise = rng.standard_normal(truth.shape, np.float32)
        estimate = (1 - cfg.estimate_noise) * truth + cfg.estimate_noise * noise
    return packing.by_importance(choice.section, schedule, timeline, estimate, fps)[0]


def latent_sample(
    record: Record, section: Section, conditions: Conditions, meta: Meta, before: int = 0
) -> Batch:
    """Cut the sample of a section out of a clip, without batch axis, as sampling reads its
    timeline. The first `before` latents are given."""
    assert record.latents is not None
    timeline = Timeline.of(record.latents[None])
    target, context = timeline.read(section.targets), packing.read_context(section, timeline)
    target, context = jax.tree.map(lambda x: x[0], (target, context))
    return Batch(target, context, packing.given_frames(section, before), conditions, meta)


def _blank(image: np.ndarray | None) -> np.ndarray | None:
    """Return image tokens without content, as sampling gives for a video from text."""
    return None if image is None else np.zeros_like(image)


def pixel_sample(
    dataset: Dataset, clip: Clip, choice: Choice, span: int, conditions: Conditions, meta: Meta
) -> PixelBatch:
    """Decode the frames that a section reads, in a window of `span` latent frames, without batch
    axis."""
    section = choice.section
    window = pixel_batch.window_of(section, dataset.length(clip), span)
    start_frame, frames = _frames(dataset, clip, window)
    return PixelBatch(
        start_frame=start_frame,
        frames=frames,
        target_at=pixel_batch.rows(section.targets, window),
        reads_at=tuple(pixel_batch.rows(group.reads, window) for group in section.groups),
        given=packing.given_frames(section, choice.before),
        indices=tuple(np.asarray(group.indices, np.int32) for group in section.groups),
        target_indices=np.asarray(section.indices, np.int32),
        kernels=tuple(group.kernel for group in section.groups),
        conditions=conditions,
        meta=meta,
    )


def _frames(
    dataset: Dataset, clip: Clip, window: pixel_batch.Window
) -> tuple[np.ndarray, np.ndarray]:
    """Decode the first frame (1, H, W, 3) of a clip and the frames of a window of it."""
    path, fps = dataset.video(clip), dataset.index.fps
    size, offset = (clip.height, clip.width), round(clip.start * fps)
    first, count = window.frames(dataset.index.time_compression)
    # A clip shorter than the window: its last frame is repeated.
    available = min(count, clip.frames - first)
    frames = read_span(path, fps, offset + first, available, size)
    frames = np.concatenate([frames, np.repeat(frames[-1:], count - available, axis=0)])
    start = frames[:1] if first == 0 else read_span(path, fps, offset, 1, size)
    return start, frames


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
