"""The plan of a video: for every section, the positions it writes and reads, and RoPE indices.

Schedule, order and number of sections give the plan. Positions count latent frames from the start
of the video. Source: arXiv 2504.12626, sections 3.1 to 3.4, and the frame indices of the authors'
two released models. Sampling and training both plan here.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

from framepack_jax.packing.schedule import (
    RELEASED_F1,
    RELEASED_INVERTED,
    Context,
    Generate,
    Schedule,
    ScheduleError,
    Skip,
    Tail,
    kernel_shape,
)

MISSING = -1
MAX_SECTIONS = 10_000
ORDERS = ("inverted", "forward", "endpoint", "planned")


@dataclasses.dataclass(frozen=True)
class Group:
    """Context frames under one kernel: absolute positions (or MISSING) and RoPE frame indices."""

    kernel: str
    reads: tuple[int, ...]
    indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """One section: positions to write, RoPE frame indices, context to read, clip to decode.

    `groups` stand in sequence order, coarsest kernel first, then in time. `decode` is the range
    (first, last + 1) of positions to decode after the section.
    """

    targets: tuple[int, ...]
    indices: tuple[int, ...]
    groups: tuple[Group, ...]
    decode: tuple[int, int]


class _Layout(NamedTuple):
    """The parts of a schedule that can be sampled."""

    anchor: Context | None
    history: Context
    window: int


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
    layout = _layout(schedule)
    least = start_frames(schedule)
    before = least if before is None else before
    starts_empty = before == 0 and schedule.order == "forward"
    if before < least and not starts_empty:
        raise ScheduleError(f"schedule {schedule}: {before} frames are known, {least} are needed")
    if (after or guide) and not schedule.reads_ahead:
        raise ScheduleError(
            f"schedule {schedule} in order {schedule.order!r} reads no frames after its own"
        )
    if schedule.order == "inverted":
        if apart or alone:
            raise ScheduleError(
                f"schedule {schedule}: only sections in forward order can have an anchor apart or"
                " be decoded alone"
            )
        return _plan_inverted(layout, sections, before, after, guide)
    if not layout.history.frames and sections > 1:
        raise ScheduleError(
            f"schedule {schedule} reads no context, so its sections would not follow each other;"
            f" {sections} sections were asked for, expected 1"
        )
    plans = _plan_forward(layout, sections, before, int(apart))
    if alone:
        plans = [dataclasses.replace(s, decode=(s.targets[0], s.targets[-1] + 1)) for s in plans]
    return plans


def _layout(schedule: Schedule) -> _Layout:
    order = schedule.order
    if not order:
        raise ScheduleError(f"schedule {schedule} generates nothing: it has no item g")
    name = order.partition("(")[0]
    if name not in ORDERS:
        raise ScheduleError(f"order {order!r}: expected one of {', '.join(ORDERS)}")
    if name in ("endpoint", "planned"):
        raise ScheduleError(f"order {order!r} cannot be sampled yet; use inverted or forward")
    if schedule.discretize is not None:
        raise ScheduleError(
            f"schedule {schedule}: history discretization (+D) is not supported yet"
        )
    for tail in schedule.items:
        if isinstance(tail, Tail) and tail.kind != "td":
            raise ScheduleError(f"schedule {schedule}: tail {tail} is not supported yet; use td")
    match order, schedule.items:
        case "inverted", (Context() as anchor, Skip(), Generate(w), Context() as history, Tail()):
            return _Layout(anchor, history, w)
        case "forward", (Context() as anchor, Skip(), Context() as history, Generate(w)):
            return _Layout(anchor, history, w)
        case "forward", (Tail(), Context() as history, Generate(w)):
            return _Layout(None, history, w)
        case "forward", (Generate(w),):
            return _Layout(None, Context(()), w)
    form = RELEASED_INVERTED if order == "inverted" else f"{RELEASED_F1} or td_f16k4f2k2f1k1_g9"
    raise ScheduleError(
        f"schedule {schedule} cannot be sampled in order {order!r}: expected the form of {form}"
    )


def start_frames(schedule: Schedule) -> int:
    """Return the number of latent frames that must be given at the start of the timeline."""
    anchor, history, _ = _layout(schedule)
    return anchor.frames if anchor else min(1, history.frames)


def span(schedule: Schedule) -> int:
    """Return how many adjacent latent frames a section writes and reads, without the anchor."""
    layout = _layout(schedule)
    return layout.window + layout.history.frames


def history_ages(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """Return the place in the history of each context frame, by group in sequence order: 0 for the
    farthest from the section, and MISSING for the anchor, which is no history."""
    layout = _layout(schedule)
    count = layout.history.frames
    ages = range(count)[::-1] if schedule.reads_ahead else range(count)
    anchor = layout.anchor
    groups = _groups(anchor, [MISSING] * anchor.frames, range(anchor.frames)) if anchor else []
    groups += _groups(layout.history, ages, range(count))
    return tuple(group.reads for group in _pack(groups))


def drop_context(plan: Sequence[Section], kernels: Collection[str]) -> list[Section]:
    """Return the plan with the context under these kernels missing, as before the start of a video.
    The difference in the result shows what the model uses that context for."""

    def blank(group: Group) -> Group:
        missing = group.kernel in kernels
        return dataclasses.replace(group, reads=(MISSING,) * len(group.reads)) if missing else group

    return [dataclasses.replace(s, groups=tuple(map(blank, s.groups))) for s in plan]


def length(plan: Sequence[Section]) -> int:
    """Return the number of latent frames of the video of a plan, given frames included."""
    return max(section.decode[1] for section in plan)


def anchor_position(schedule: Schedule, before: int) -> int:
    """Return the position of the anchor image for `before` frames given at the start: the last one
    if sections are generated towards it, else the first."""
    return before - 1 if schedule.reads_ahead else 0


def inverted_paddings(sections: int) -> list[int]:
    """Return the windows between start and target, in order of generation (the released rule).

    Long videos reuse small distances, which the model has seen in training.
    """
    if sections <= 4:
        return list(range(sections))[::-1]
    return [3, *[2] * (sections - 3), 1, 0]


def _plan_inverted(
    layout: _Layout, sections: int, before: int, after: int, guide: bool
) -> list[Section]:
    anchor, history, w = layout
    assert anchor is not None, "a schedule whose sections read ahead has an anchor"
    end = before + sections * w + after
    plans = []
    for s, padding in zip(reversed(range(sections)), inverted_paddings(sections), strict=True):
        first = before + s * w
        index = anchor.frames + padding * w
        known = end + (guide and s == sections - 1)
        reads = [p if p < known else MISSING for p in _span(first + w, history.frames)]
        groups = _groups(anchor, _span(before - anchor.frames, anchor.frames), range(index))
        groups += _groups(history, reads, _span(index + w, history.frames))
        last = end if s == sections - 1 else min(first + 2 * w, end)
        plans.append(
            Section(
                tuple(_span(first, w)), tuple(_span(index, w)), _pack(groups),
                (_decoded_from(s, first, before, w, 0), last),
            )
        )  # fmt: skip
    return plans


def _plan_forward(layout: _Layout, sections: int, before: int, oldest: int) -> list[Section]:
    """Plan with history from position `oldest` on."""
    anchor, history, w = layout
    offset = anchor.frames if anchor else 0
    index = offset + history.frames
    plans = []
    for s in range(sections):
        first = before + s * w
        past = _span(first - history.frames, history.frames)
        reads = [p if p >= oldest else MISSING for p in past]
        there = [p if p < first else MISSING for p in range(offset)]
        groups = _groups(anchor, there, range(offset)) if anchor else []
        groups += _groups(history, reads, _span(offset, history.frames))
        plans.append(
            Section(
                tuple(_span(first, w)), tuple(_span(index, w)), _pack(groups),
                (_decoded_from(s, first, before, w, w), first + w),
            )
        )  # fmt: skip
    return plans


def _decoded_from(section: int, first: int, before: int, window: int, overlap: int) -> int:
    """Return the first position of a section's clip; the first in time includes given frames."""
    return max(0, before - window) if section == 0 else first - overlap


def _span(first: int, count: int) -> range:
    return range(first, first + count)


def _groups(context: Context, reads: Sequence[int], indices: Sequence[int]) -> list[Group]:
    groups, at = [], 0
    for segment in context.segments:
        end = at + segment.frames
        groups.append(Group(segment.kernel, tuple(reads[at:end]), tuple(indices[at:end])))
        at = end
    return groups


def _pack(groups: list[Group]) -> tuple[Group, ...]:
    """Sequence order: coarsest kernel first; groups of one kernel stay in time order."""
    return tuple(sorted(groups, key=lambda g: kernel_shape(g.kernel), reverse=True))
