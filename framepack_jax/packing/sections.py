"""The plan of a video: for every section, the positions it writes and reads, and RoPE indices.

Schedule, order and number of sections give the plan. Positions count latent frames from the start
of the video. Source: arXiv 2504.12626, sections 3.1 to 3.4, and the frame indices of the authors'
two released models. Sampling and training both plan here; `orders` has the passes of each order.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from framepack_jax.packing import orders
from framepack_jax.packing.form import Form, form_of
from framepack_jax.packing.kernels import ScheduleError, tail_of
from framepack_jax.packing.orders import MISSING, Extent, Group, Pass
from framepack_jax.packing.schedule import Schedule

MAX_SECTIONS = 10_000
Range = tuple[int, int]
"""Positions (first, last + 1)."""


@dataclasses.dataclass(frozen=True)
class Section:
    """One pass of the network: positions to write, RoPE frame indices, context to read, clips.

    `targets` are one section, or two for the pass of an endpoint order that makes the beginning and
    the end. `groups` stand in sequence order, coarsest kernel first, then in time. `decode` has the
    ranges of positions to decode as clips after the pass: one for a growing video, two where two
    parts of it meet or begin, none for a section that both its neighbours decode later.
    """

    targets: tuple[int, ...]
    indices: tuple[int, ...]
    groups: tuple[Group, ...]
    decode: tuple[Range, ...]


def plan(
    schedule: Schedule,
    sections: int,
    *,
    before: int | None = None,
    after: int = 0,
    guide: bool = False,
    apart: bool = False,
    alone: bool = False,
) -> list[Section]:
    """Return the sections of a video in the order of generation.

    `before` frames are given at the start (default: as many as the schedule needs, a start image;
    more if a video is extended), `after` frames at the end (an end image). With `guide`, the frame
    after the last one is given too: the first section to be generated reads it, and it is not part
    of the video. Only an order that reads ahead can use `after` and `guide`.

    A forward order can start empty (`before` 0): the first section reads nothing, and its first
    frame becomes the anchor of all others. With `apart`, position 0 holds the anchor alone, which
    is neither history nor part of the video; given history follows it. Sections that are decoded
    `alone` have clips without overlap. Raises ScheduleError if the schedule cannot be sampled.
    """
    if not 1 <= sections <= MAX_SECTIONS:
        raise ScheduleError(f"sections = {sections}: expected 1 to {MAX_SECTIONS}")
    form = form_of(schedule)
    least = start_frames(schedule)
    before = least if before is None else before
    if before < least and (before or schedule.reads_ahead):
        raise ScheduleError(f"schedule {schedule}: {before} frames are known, {least} are needed")
    if (after or guide) and not schedule.reads_ahead:
        raise ScheduleError(
            f"schedule {schedule} in order {schedule.order!r} reads no frames after its own"
        )
    if (apart or alone) and schedule.reads_ahead:
        raise ScheduleError(
            f"schedule {schedule}: only sections in forward order can have an anchor apart or"
            " be decoded alone"
        )
    if (apart or alone) and schedule.importance:
        raise ScheduleError(
            f"schedule {schedule}: history ordered by importance needs sections that are decoded"
            " together, and an anchor that is part of the video"
        )
    if not schedule.segments and sections > 1:
        raise ScheduleError(
            f"schedule {schedule} reads no context, so its sections would not follow each other;"
            f" {sections} sections were asked for, expected 1"
        )
    extent = Extent(sections, before, form.window, after, guide)
    passes = _passes(schedule, form, extent, int(apart))
    made: set[int] = set()
    plans = []
    for each in passes:
        ranges = [_range(extent, s) for s in each.sections]
        clips = [clip for s in each.sections for clip in _clips(extent, made, s)]
        targets = tuple(p for first, stop in ranges for p in range(first, stop))
        decode = tuple(ranges if alone else clips)
        plans.append(Section(targets, each.indices, each.groups, decode))
    return plans


def _passes(schedule: Schedule, form: Form, extent: Extent, oldest: int) -> Iterable[Pass]:
    if schedule.stride:
        return orders.planned(form, extent, schedule.stride)
    if schedule.order == "endpoint":
        return orders.endpoint(form, extent)
    if form.backward:
        return orders.inverted(form, extent)
    return orders.forward(form, extent, oldest)


def _range(extent: Extent, section: int) -> Range:
    return extent.first(section), extent.first(section + 1)


def _clips(extent: Extent, made: set[int], section: int) -> list[Range]:
    """Return the clips to decode after a section, and count it among those that are `made`.

    A section is decoded with each neighbour that is made, so that clips overlap by a section, over
    which they are cross-faded. The first clip in time begins with given frames, the last one ends
    with them. A section that is made before both its neighbours belongs to their clips alone.
    """
    earlier, later = section - 1 in made, section + 1 in made
    made.add(section)
    first, stop = _range(extent, section)
    starts, ends = section == 0, section == extent.sections - 1
    begin = max(0, first - extent.window) if starts or earlier else first
    end = extent.end if ends else stop
    if later:
        following = (begin if starts else first, stop + extent.window)
        return [(begin, stop), following] if earlier else [following]
    return [(begin, end)] if starts or ends or earlier else []


def start_frames(schedule: Schedule) -> int:
    """Return the number of latent frames that must be given at the start of the timeline: one, a
    start image, if sections read any context."""
    form_of(schedule)
    return min(1, len(schedule.segments))


def pass_frames(schedule: Schedule, sections: int | None = None) -> tuple[int, ...]:
    """Return the numbers of latent frames that passes of the network make, of videos of this number
    of sections or of any: a latent window, and two in the first pass of an endpoint order."""
    window = schedule.window
    if schedule.order != "endpoint" or sections == 1:
        return (window,)
    return (2 * window,) if sections == 2 else (window, 2 * window)


def span(schedule: Schedule) -> int:
    """Return how many adjacent latent frames a section writes and reads, without the anchor."""
    form = form_of(schedule)
    return form.window + form.history.frames


def reads_far_back(schedule: Schedule) -> bool:
    """Return True if sections read more of what is far before them than the first frame."""
    form = form_of(schedule)
    if schedule.importance:
        return True
    return not form.backward and (form.anchor.frames > 1 or bool(form.tail))


def reads_nearby(schedule: Schedule) -> bool:
    """Return True if sections read frames within `span` of them, and the first frame alone."""
    local = schedule.order in ("forward", "inverted") and not form_of(schedule).tail
    return local and not reads_far_back(schedule)


def history_ages(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """Return the place in the history of each context frame, by group in sequence order: 0 for the
    farthest from the section, and MISSING for the anchor and the ending, which are no history."""
    return tuple(group.reads for group in orders.blank_groups(form_of(schedule)))


def given_frames(section: Section, before: int) -> tuple[np.ndarray, ...]:
    """Return masks (F,) of the context frames of a section, by group, that are among the first
    `before`. A tail tc is one frame, the mean."""

    def mask(group: Group) -> np.ndarray:
        given = np.asarray([MISSING < position < before for position in group.reads])
        return np.asarray([given.all()]) if tail_of(group.kernel) == "tc" else given

    return tuple(map(mask, section.groups))


def drop_context(plan: Sequence[Section], kernels: Collection[str]) -> list[Section]:
    """Return the plan with the context under these kernels missing, as before the start of a video.
    The difference in the result shows what the model uses that context for."""

    def blank(group: Group) -> Group:
        missing = group.kernel in kernels
        return dataclasses.replace(group, reads=(MISSING,) * len(group.reads)) if missing else group

    return [dataclasses.replace(s, groups=tuple(map(blank, s.groups))) for s in plan]


def without_history(section: Section, schedule: Schedule) -> Section:
    """Return a section that reads the anchor, the ending and the start image alone."""
    start = start_frames(schedule)

    def blank(group: Group, ages: Sequence[int]) -> Group:
        if tail_of(group.kernel):
            return dataclasses.replace(group, reads=(MISSING,) * len(group.reads))
        kept = [
            read if age == MISSING or read < start else MISSING
            for read, age in zip(group.reads, ages, strict=True)
        ]
        return dataclasses.replace(group, reads=tuple(kept))

    groups = map(blank, section.groups, history_ages(schedule))
    return dataclasses.replace(section, groups=tuple(groups))


def length(plan: Sequence[Section]) -> int:
    """Return the number of latent frames of the video of a plan, given frames included."""
    return max(stop for section in plan for _, stop in section.decode)


def anchor_position(schedule: Schedule, before: int) -> int:
    """Return the position of the anchor image for `before` frames given at the start: the last one
    if sections are generated towards it, else the first."""
    return before - 1 if form_of(schedule).backward else 0
