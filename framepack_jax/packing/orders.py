"""The passes of each order: which sections a pass makes, and what it reads at which RoPE indices.

Sources: arXiv 2504.12626, section 3.3 and figure 2, and the frame indices of the authors' two
released models. Endpoint and planned orders are described there in words; their indices, and what
the sections of a planned order read, are our reading.

Indices lie side by side: anchor, history, target for sections that follow their history; anchor,
gap, target, history for sections that are made towards the anchor. The indices of a tail go on
beyond those of the history, below 0 too. A gap is a whole number of latent windows, and clipped as
the release clips it (`inverted_paddings`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from framepack_jax.packing.form import Form
from framepack_jax.packing.kernels import kernel_shape, tail_of
from framepack_jax.packing.schedule import Context

MISSING = -1
# Most frames of a tail `ta`; older ones are left out.
TAIL_FRAMES = 512


@dataclasses.dataclass(frozen=True)
class Group:
    """Context frames under one kernel: absolute positions (or MISSING) and RoPE frame indices.

    A tail `tc` reads all frames, one MISSING frame if there are none; `ta` has TAIL_FRAMES places,
    of which the first ones are MISSING.
    """

    kernel: str
    reads: tuple[int, ...]
    indices: tuple[int, ...]


class Pass(NamedTuple):
    """One pass of the network: the sections that it makes, counted in time, RoPE frame indices of
    their frames, and the context in sequence order."""

    sections: tuple[int, ...]
    indices: tuple[int, ...]
    groups: tuple[Group, ...]


class Extent(NamedTuple):
    """The sections of a video: `sections` of them after `before` given frames. Given frames `after`
    them follow up to position `end`; with a `guide`, so does one more, which is no frame of the
    video."""

    sections: int
    before: int
    window: int
    after: int = 0
    guide: bool = False

    def first(self, section: int) -> int:
        """Return the first position of a section."""
        return self.before + section * self.window

    @property
    def end(self) -> int:
        """Return the length of the video."""
        return self.first(self.sections) + self.after


def inverted_paddings(sections: int) -> list[int]:
    """Return the windows between start and target, in order of generation (the released rule).

    Long videos reuse small distances, which the model has seen in training.
    """
    if sections <= 4:
        return list(range(sections))[::-1]
    return [3, *[2] * (sections - 3), 1, 0]


def inverted(form: Form, extent: Extent, oldest: int = 0) -> Iterator[Pass]:
    """Make sections from the last to the first, towards the anchor, which begins at position
    `oldest` or later."""
    w, size = form.window, form.anchor.frames
    last = extent.sections - 1
    for s, padding in zip(range(last, -1, -1), inverted_paddings(extent.sections), strict=True):
        index, known = size + padding * w, extent.end + (extent.guide and s == last)
        reads = _up_to(known, span(extent.first(s + 1), form.history.frames))
        start = _from(oldest, span(extent.before - size, size))
        groups = _groups(form.anchor, start, range(size))
        groups += _groups(form.history, reads, span(index + w, form.history.frames))
        beyond = form.history.frames + extent.first(s + 1)
        groups += _tail(form, range(beyond, known), index + w + form.history.frames)
        yield Pass((s,), tuple(span(index, w)), pack(groups))


def forward(form: Form, extent: Extent, oldest: int = 0) -> Iterator[Pass]:
    """Make sections in order of time; history begins at position `oldest`."""
    for s in range(extent.sections):
        indices = tuple(span(_target(form), form.window))
        yield Pass((s,), indices, pack(_past(form, extent.first(s), oldest)))


def endpoint(form: Form, extent: Extent) -> Iterator[Pass]:
    """Make the first and the last section in one pass, then fill the gap between them in order of
    time. The first pass knows the distance of its two sections, and reads the frames after the
    video, if any, in the place of the ending; the others read the first frames of the last section.
    """
    w, index, last = form.window, _target(form), extent.sections - 1
    ends = (0, last) if last else (0,)
    indices = tuple(i for s in ends for i in span(index + s * w, w))
    groups = _past(form, extent.first(0))
    yield Pass(ends, indices, pack([*groups, *_after(form, extent, extent.sections)]))
    gaps = inverted_paddings(max(0, last - 1))
    for s, gap in zip(range(1, last), gaps, strict=True):
        groups = _past(form, extent.first(s))
        groups += _ending(form, extent.first(last), extent.end, gap)
        yield Pass((s,), tuple(span(index, w)), pack(groups))


def planned(form: Form, extent: Extent, stride: int) -> Iterator[Pass]:
    """Make the last of every `stride` sections, one after the other; then fill the parts before
    them, in order of time.

    A part is a video of its own that starts from the last frames of the part before. So the weights
    of a form made towards its anchor make it: the anchor moves. A form with an ending fills a part
    forward, towards the first frames of its last section. While parts are empty, the last section
    of a part reads that of the part before as its history, and MISSING beyond.
    """
    parts = [
        Extent(min(stride, extent.sections - s), extent.first(s), form.window)
        for s in range(0, extent.sections, stride)
    ]
    parts[-1] = parts[-1]._replace(after=extent.after, guide=extent.guide)
    made = []
    for number, part in enumerate(parts):
        oldest = part.before - form.window if number and stride > 1 else 0
        passes = (
            inverted(form, part, oldest) if form.backward else _part(form, part, oldest, extent)
        )
        first = number * stride
        made.append([p._replace(sections=tuple(first + s for s in p.sections)) for p in passes])
    yield from (passes[0] for passes in made)
    yield from (each for passes in made for each in passes[1:])


def _part(form: Form, part: Extent, oldest: int, extent: Extent) -> Iterator[Pass]:
    """Make the last section of a part of a video, with history from position `oldest` on; then the
    others."""
    w, index, last = form.window, _target(form), part.sections - 1
    gap = inverted_paddings(part.sections)[0]
    groups = _past(form, part.before, oldest, extent.before if oldest else part.before)
    groups += _after(form, part, 1 + gap)
    yield Pass((last,), tuple(span(index + gap * w, w)), pack(groups))
    for s, gap in zip(range(last), inverted_paddings(last), strict=True):
        groups = _past(form, part.first(s))
        groups += _ending(form, part.first(last), part.end, gap)
        yield Pass((s,), tuple(span(index, w)), pack(groups))


def span(first: int, count: int) -> range:
    """Return `count` numbers from `first` on."""
    return range(first, first + count)


def pack(groups: list[Group]) -> tuple[Group, ...]:
    """Sequence order: a tail, then coarsest kernel first; groups of one kernel stay in time
    order."""

    def key(group: Group) -> tuple[bool, tuple[int, int, int]]:
        return bool(tail_of(group.kernel)), kernel_shape(group.kernel)

    return tuple(sorted(groups, key=key, reverse=True))


def blank_groups(form: Form) -> tuple[Group, ...]:
    """Return the groups of a section in sequence order. They read places in the history, 0 for the
    farthest from the section, and MISSING for the anchor and the ending."""
    ages = range(form.history.frames)
    groups = _groups(form.anchor, [MISSING] * form.anchor.frames, range(form.anchor.frames))
    groups += _groups(form.history, ages[::-1] if form.backward else ages, ages)
    newest = span(form.history.frames, form.ending.frames)
    groups += _groups(form.ending, [MISSING] * form.ending.frames, newest)
    tails = _tail(form, range(0), 0)
    # A tail is as old as the farthest frame of the history.
    return pack([*groups, *(dataclasses.replace(t, reads=(0,) * len(t.reads)) for t in tails)])


def _target(form: Form) -> int:
    """Return the index of a target that follows its history."""
    return form.anchor.frames + form.history.frames


def _past(form: Form, first: int, oldest: int = 0, start: int | None = None) -> list[Group]:
    """Return the groups before a target from position `first` on: the first frames of the video, up
    to `start` (default: `first`), and the history and the tail from `oldest` on."""
    size, count = form.anchor.frames, form.history.frames
    there = first if start is None else start
    groups = _groups(form.anchor, _up_to(there, range(size)), range(size))
    reads = _from(oldest, span(first - count, count))
    groups += _groups(form.history, reads, span(size, count))
    older = range(oldest, max(oldest, first - count))
    return groups + _tail(form, older, size - len(older))


def _tail(form: Form, positions: range, index: int) -> list[Group]:
    """Return the group of the frames beyond the history, if the form has one: these positions, in
    order of time, the first at `index`."""
    treatment = tail_of(form.tail)
    if treatment == "ta":
        far = max(0, len(positions) - TAIL_FRAMES)
        kept = positions[:-far] if form.backward and far else positions[far:]
        missing = TAIL_FRAMES - len(kept)
        index += 0 if form.backward else far
        reads = (*[MISSING] * missing, *kept)
        return [Group(form.tail, reads, tuple(span(index - missing, TAIL_FRAMES)))]
    if treatment == "tc":
        edge = index if form.backward else index - 1
        first, count = (index, len(positions)) if positions else (edge, 1)
        return [Group(form.tail, tuple(positions) or (MISSING,), tuple(span(first, count)))]
    return []


def _ending(form: Form, first: int, end: int, gap: int) -> list[Group]:
    """Return the group of what follows a target beyond a gap of windows: the positions from `first`
    on that lie before `end`."""
    count, index = form.ending.frames, _target(form) + (1 + gap) * form.window
    return _groups(form.ending, _up_to(end, span(first, count)), span(index, count))


def _after(form: Form, extent: Extent, windows: int) -> list[Group]:
    """Return the group of the given frames after the video, `windows` windows after the history."""
    first, known = extent.first(extent.sections), extent.end + extent.guide
    return _ending(form, first, known, windows - 1)


def _from(oldest: int, positions: Sequence[int]) -> list[int]:
    return [p if p >= oldest else MISSING for p in positions]


def _up_to(end: int, positions: Sequence[int]) -> list[int]:
    return [p if p < end else MISSING for p in positions]


def _groups(context: Context, reads: Sequence[int], indices: Sequence[int]) -> list[Group]:
    groups, at = [], 0
    for segment in context.segments:
        end = at + segment.frames
        groups.append(Group(segment.kernel, tuple(reads[at:end]), tuple(indices[at:end])))
        at = end
    return groups
