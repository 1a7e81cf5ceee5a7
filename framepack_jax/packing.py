"""The FramePack idea: which frames a section of video sees, how strongly compressed, and where.

Source: "Frame Context Packing and Drift Prevention in Next-Frame-Prediction Video Diffusion
Models", arXiv 2504.12626, sections 3.1 to 3.4, whose variant strings are the grammar here, and the
frame indices of the authors' two released models. Sampling and training ask this file alone.

A *schedule* is such a string, its items in time order:

    schedule = item ("_" item)* ["+D" [number]]      f1k1_x_g9_f1k1f2k2f16k4_td
    item     = context | "g" frames | "x" | tail
    context  = ("f" frames kernel)+                  contiguous frames, earlier to the left
    kernel   = "k" n | "k" t "h" h "w" w             k1 = (1,2,2), k2 = (2,4,4), k4 = (4,8,8), ...
    tail     = "td" | "ta" | "tc"                    delete | append | compress the far history

An *order* says in which sequence sections are made. Schedule, order and number of sections give
the *plan*: for every section the positions it writes, the positions each context group reads, and
the RoPE frame indices of both. Positions count latent frames from the start of the video.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import struct

MISSING = -1
MAX_SECTIONS = 10_000
ORDERS = ("inverted", "forward", "endpoint", "planned")
RELEASED_INVERTED = "f1k1_x_g9_f1k1f2k2f16k4_td"
RELEASED_F1 = "f1k1_x_f16k4f2k2f1k1_g9"
DEFAULT_CODEBOOK = 128

_NUMBER = "[1-9][0-9]*"
_RUN = re.compile(rf"f({_NUMBER})(k{_NUMBER}(?:h{_NUMBER}w{_NUMBER})?)")
_KERNEL = re.compile(rf"k({_NUMBER})(?:h({_NUMBER})w({_NUMBER}))?")


class ScheduleError(ValueError):
    """A schedule or order that cannot be read, or not be sampled."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Contiguous frames under one patch kernel, `f16k4`."""

    frames: int
    kernel: str

    def __str__(self) -> str:
        return f"f{self.frames}{self.kernel}"


@dataclasses.dataclass(frozen=True)
class Context:
    """Contiguous context frames, `f1k1f2k2f16k4`."""

    runs: tuple[Run, ...]

    @property
    def frames(self) -> int:
        return sum(run.frames for run in self.runs)

    def __str__(self) -> str:
        return "".join(map(str, self.runs))


@dataclasses.dataclass(frozen=True)
class Generate:
    """Frames to be made, `g9`: the latent window of a section."""

    frames: int

    def __str__(self) -> str:
        return f"g{self.frames}"


@dataclasses.dataclass(frozen=True)
class Skip:
    """Frames that are left out, `x`."""

    def __str__(self) -> str:
        return "x"


@dataclasses.dataclass(frozen=True)
class Tail:
    """What happens to history past the schedule: `td`, `ta` or `tc`."""

    kind: str

    def __str__(self) -> str:
        return self.kind


Item = Context | Generate | Skip | Tail


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A parsed schedule; `str` gives back the spelling that was parsed.

    `discretize` is None, or the text after "+D": "" for the default codebook size, or a number.
    """

    items: tuple[Item, ...]
    discretize: str | None = None

    def __str__(self) -> str:
        suffix = "" if self.discretize is None else f"+D{self.discretize}"
        return "_".join(map(str, self.items)) + suffix

    @property
    def window(self) -> int:
        """Latent window: frames of the only `g`. Raises ScheduleError where it is not one."""
        windows = [item.frames for item in self.items if isinstance(item, Generate)]
        if len(windows) != 1:
            raise ScheduleError(f"schedule {self} has {len(windows)} items g, expected one")
        return windows[0]

    def with_window(self, window: int) -> "Schedule":
        """The same with another latent window. Raises ScheduleError where it has not one."""
        old = Generate(self.window)
        items = tuple(Generate(window) if item == old else item for item in self.items)
        return dataclasses.replace(self, items=items)

    @property
    def runs(self) -> tuple[Run, ...]:
        """All context runs in time order."""
        return tuple(r for item in self.items if isinstance(item, Context) for r in item.runs)

    @property
    def codebook(self) -> int | None:
        """Entries of the history codebook, None without discretization."""
        return None if self.discretize is None else int(self.discretize or DEFAULT_CODEBOOK)


def parse(text: str) -> Schedule:
    """Read a schedule. Raises ScheduleError that names the item which cannot be read."""
    body, plus, discretize = text.partition("+")
    if plus and not re.fullmatch(rf"D({_NUMBER})?", discretize):
        raise ScheduleError(
            f"schedule {text!r}: cannot read {plus + discretize!r}; expected +D or +D128"
        )
    items = tuple(_parse_item(item, text) for item in body.split("_"))
    return Schedule(items, discretize[1:] if plus else None)


def _parse_item(item: str, schedule: str) -> Item:
    if item == "x":
        return Skip()
    if item in ("td", "ta", "tc"):
        return Tail(item)
    if re.fullmatch(f"g{_NUMBER}", item):
        return Generate(int(item[1:]))
    if item and re.fullmatch(f"(?:{_RUN.pattern})+", item):
        return Context(tuple(Run(int(run[1]), run[2]) for run in _RUN.finditer(item)))
    raise ScheduleError(
        f"schedule {schedule!r}: cannot read item {item!r}; expected frames with kernels"
        " (f1k1f2k2), frames to generate (g9), a gap (x) or a tail (td, ta, tc)"
    )


def kernel_shape(kernel: str) -> tuple[int, int, int]:
    """(time, height, width) of a kernel name in latent cells: "k2" -> (2, 4, 4)."""
    match = _KERNEL.fullmatch(kernel)
    if not match:
        raise ScheduleError(f"kernel {kernel!r}: expected a name such as k1, k4 or k1h4w4")
    time, height, width = match.groups()
    return int(time), int(height or 2 * int(time)), int(width or 2 * int(time))


@dataclasses.dataclass(frozen=True)
class Group:
    """Context frames under one kernel: absolute positions (or MISSING) and RoPE frame indices."""

    kernel: str
    reads: tuple[int, ...]
    indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """One section: positions to write, RoPE frame indices, what it reads, what it lets us decode.

    `groups` stand in sequence order, coarsest kernel first, then in time. `decode` is the range
    (first, last + 1) of positions that is decoded when the section is done.
    """

    targets: tuple[int, ...]
    indices: tuple[int, ...]
    groups: tuple[Group, ...]
    decode: tuple[int, int]


class _Layout(NamedTuple):
    """A schedule as the two orders that can be sampled use it."""

    anchor: Context | None
    history: Context
    window: int


def default_order(schedule: str | Schedule) -> str:
    """The order that the released models, or the paper, use with a schedule of this form."""
    schedule = parse(schedule) if isinstance(schedule, str) else schedule
    windows = [i for i, item in enumerate(schedule.items) if isinstance(item, Generate)]
    if not windows:
        raise ScheduleError(f"schedule {schedule} generates nothing: it has no item g")
    after = any(isinstance(item, Context) for item in schedule.items[windows[0] + 1 :])
    before = windows[0] > 0 and isinstance(schedule.items[windows[0] - 1], Context)
    return "endpoint" if before and after else "inverted" if after else "forward"


def plan(
    schedule: str | Schedule,
    order: str,
    sections: int,
    *,
    before: int | None = None,
    after: int = 0,
    guide: bool = False,
) -> list[Section]:
    """Return the sections of a video in the order of their making.

    `before` frames are known at the start (by default those that the schedule needs, a start
    image; more where a video is extended), `after` frames at the end (an end image). With `guide`,
    the frame that follows the last one is known, too: the section made first reads it, and it is
    not a part of the video. Only an order that reads ahead can use `after` and `guide`. Raises
    ScheduleError for what cannot be sampled, by name.
    """
    schedule = parse(schedule) if isinstance(schedule, str) else schedule
    if not 1 <= sections <= MAX_SECTIONS:
        raise ScheduleError(f"sections = {sections}: expected 1 to {MAX_SECTIONS}")
    layout = _layout(schedule, order)
    least = start_frames(schedule, order)
    before = least if before is None else before
    if before < least:
        raise ScheduleError(f"schedule {schedule}: {before} frames are known, {least} are needed")
    if (after or guide) and not reads_ahead(order):
        raise ScheduleError(f"schedule {schedule} in order {order!r} reads no frames after its own")
    if order == "inverted":
        return _plan_inverted(layout, sections, before, after, guide)
    return _plan_forward(layout, sections, before)


def _layout(schedule: Schedule, order: str) -> _Layout:
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
    form = RELEASED_INVERTED if order == "inverted" else f"{RELEASED_F1} or td_f16k4f2k2f1k1_g9"
    raise ScheduleError(
        f"schedule {schedule} cannot be sampled in order {order!r}: expected the form of {form}"
    )


def start_frames(schedule: str | Schedule, order: str) -> int:
    """Latent frames at the start of the timeline that must be known before sampling."""
    schedule = parse(schedule) if isinstance(schedule, str) else schedule
    anchor = _layout(schedule, order).anchor
    return anchor.frames if anchor else 1


def span(schedule: str | Schedule, order: str) -> int:
    """Most latent frames, next to each other, that a section writes and reads beside the anchor."""
    schedule = parse(schedule) if isinstance(schedule, str) else schedule
    layout = _layout(schedule, order)
    return layout.window + layout.history.frames


def blanked(plan: Sequence[Section], kernels: Collection[str]) -> list[Section]:
    """The plan without the context under these kernels, which is missing as it is before a video
    begins: what a model makes then shows what it takes from there."""

    def blank(group: Group) -> Group:
        missing = group.kernel in kernels
        return dataclasses.replace(group, reads=(MISSING,) * len(group.reads)) if missing else group

    return [dataclasses.replace(s, groups=tuple(map(blank, s.groups))) for s in plan]


def length(plan: Sequence[Section]) -> int:
    """Latent frames of the video that a plan makes, with all that is known beside it."""
    return max(section.decode[1] for section in plan)


def reads_ahead(order: str) -> bool:
    """Whether sections read frames that come after them, as the end of a video."""
    return order == "inverted"


def anchor_position(order: str, before: int) -> int:
    """Where the image lies that leads every section, `before` frames being known at the start: the
    last of them where sections are made towards it, else the first."""
    return before - 1 if order == "inverted" else 0


def inverted_paddings(sections: int) -> list[int]:
    """Windows between start and target, in generation order (the released rule).

    Long videos reuse small distances, which the model has seen in training.
    """
    if sections <= 4:
        return list(range(sections))[::-1]
    return [3, *[2] * (sections - 3), 1, 0]


def _plan_inverted(
    layout: _Layout, sections: int, before: int, after: int, guide: bool
) -> list[Section]:
    anchor, history, w = layout
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


def _plan_forward(layout: _Layout, sections: int, before: int) -> list[Section]:
    anchor, history, w = layout
    offset = anchor.frames if anchor else 0
    index = offset + history.frames
    plans = []
    for s in range(sections):
        first = before + s * w
        reads = [p if p >= 0 else MISSING for p in _span(first - history.frames, history.frames)]
        groups = _groups(anchor, range(offset), range(offset)) if anchor else []
        groups += _groups(history, reads, _span(offset, history.frames))
        plans.append(
            Section(
                tuple(_span(first, w)), tuple(_span(index, w)), _pack(groups),
                (_decoded_from(s, first, before, w, w), first + w),
            )
        )  # fmt: skip
    return plans


def _decoded_from(section: int, first: int, before: int, window: int, overlap: int) -> int:
    """Where the clip of a section begins: the first in time takes in what is known before it."""
    return max(0, before - window) if section == 0 else first - overlap


def _span(first: int, count: int) -> range:
    return range(first, first + count)


def _groups(context: Context, reads: Sequence[int], indices: Sequence[int]) -> list[Group]:
    groups, at = [], 0
    for run in context.runs:
        end = at + run.frames
        groups.append(Group(run.kernel, tuple(reads[at:end]), tuple(indices[at:end])))
        at = end
    return groups


def _pack(groups: list[Group]) -> tuple[Group, ...]:
    """Sequence order: coarsest kernel first; groups of one kernel stay in time order."""
    return tuple(sorted(groups, key=lambda g: kernel_shape(g.kernel), reverse=True))


class Timeline:
    """Latent frames at absolute positions, on the host, with a mask of what is known.

    `latents` is (B, T, H, W, C), float32 unless made `of` others, `known` is (T,). In training all
    of it is known.
    """

    def __init__(self, length: int, frame_shape: tuple[int, int, int], batch: int = 1) -> None:
        self.latents = np.zeros((batch, length, *frame_shape), np.float32)
        self.known = np.zeros(length, bool)

    @classmethod
    def of(cls, latents: np.ndarray) -> "Timeline":
        """A timeline of latents (B, T, H, W, C) of any dtype, all known, which are not copied."""
        timeline = cls.__new__(cls)
        timeline.latents, timeline.known = latents, np.ones(latents.shape[1], bool)
        return timeline

    def write(self, positions: Sequence[int], latents: np.ndarray) -> None:
        """Put (B, len(positions), H, W, C) latents at positions."""
        self.latents[:, list(positions)] = latents
        self.known[list(positions)] = True

    def read(self, positions: Sequence[int]) -> np.ndarray:
        """(B, len(positions), H, W, C); MISSING reads zeros. Raises ValueError if not yet known."""
        positions = np.asarray(positions, int)
        if unknown := [int(p) for p in positions if p != MISSING and not self.known[p]]:
            raise ValueError(f"the timeline does not know positions {unknown} yet")
        latents = self.latents[:, positions]
        latents[:, positions == MISSING] = 0
        return latents


@struct.dataclass
class PackedContext:
    """What the network reads besides the noisy target, a group an entry, in sequence order.

    `latents[i]` (B, F, H, W, C), `indices[i]` (B, F) frame indices, `kernels[i]` its patch kernel;
    `target_indices` (B, w). Only the kernels are static: all sections of a video share one program.
    """

    latents: tuple[jax.Array | np.ndarray, ...]
    indices: tuple[jax.Array | np.ndarray, ...]
    target_indices: jax.Array | np.ndarray
    kernels: tuple[str, ...] = struct.field(pytree_node=False)


def read_target(section: Section, timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """What is known of the frames that a section writes: latents (B, w, H, W, C), zero where
    nothing is, and the mask (w,)."""
    known = timeline.known[list(section.targets)]
    positions = np.where(known, section.targets, MISSING)
    return timeline.read(positions), known


def read_context(section: Section, timeline: Timeline) -> PackedContext:
    """Gather the context of a section from the timeline, as sampling and training both do."""
    batch = timeline.latents.shape[0]

    def per_sample(indices: Sequence[int]) -> np.ndarray:
        return np.tile(np.asarray(indices, np.int32), (batch, 1))

    return PackedContext(
        latents=tuple(timeline.read(group.reads) for group in section.groups),
        indices=tuple(per_sample(group.indices) for group in section.groups),
        target_indices=per_sample(section.indices),
        kernels=tuple(group.kernel for group in section.groups),
    )


def position_at(seconds: float, fps: float = 30, time_compression: int = 4) -> int:
    """The latent position of the frame that is shown at a time: the first latent is one frame,
    every other `time_compression`. Raises ValueError for a time that is negative or not finite."""
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"time {seconds} s: expected a number of seconds, 0 or more")
    return -(-round(seconds * fps) // time_compression)


def frames_of(first: int, last: int, time_compression: int = 4) -> tuple[int, int]:
    """(first frame, last frame + 1) of latent positions first .. last - 1 decoded as one clip,
    whose first latent gives one frame."""
    return first * time_compression, (last - 1) * time_compression + 1


def sections_for(seconds: float, window: int, fps: float = 30, time_compression: int = 4) -> int:
    """Sections that come closest to a duration (the released rule, with Python's round).

    Raises ValueError unless seconds and fps are positive, finite numbers.
    """
    for name, value in (("seconds", seconds), ("fps", fps)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} = {value}: expected a positive number")
    exact = seconds * fps / (time_compression * window)
    if exact > MAX_SECTIONS + 0.5:  # which may be infinity
        raise ValueError(f"seconds = {seconds} is {exact:.3g} sections; at most {MAX_SECTIONS}")
    return max(1, round(exact))


def group_tokens(frames: int, kernel: str, height: int, width: int) -> int:
    """Tokens of frames at (height, width) latent cells; ragged edges are padded to the kernel."""
    shape = kernel_shape(kernel)
    return math.prod(-(-n // k) for n, k in zip((frames, height, width), shape, strict=True))


def target_tokens(schedule: str | Schedule, height: int, width: int) -> int:
    """Tokens of the section that is made, which decide the flow shift."""
    schedule = parse(schedule) if isinstance(schedule, str) else schedule
    return group_tokens(schedule.window, "k1", height, width)


def context_tokens(schedule: str | Schedule, height: int, width: int) -> list[tuple[Run, int]]:
    """(run, tokens) of every context run in time order: constant, whatever the video's length."""
    schedule = parse(schedule) if isinstance(schedule, str) else schedule
    return [(r, group_tokens(r.frames, r.kernel, height, width)) for r in schedule.runs]


def frame_bound(window: int, ratio: float = 2) -> float:
    """The paper's limit for the length of target and endless history, in whole frames.

    window + ratio / (ratio - 1), every older frame being `ratio` times shorter than the one after
    it (arXiv 2504.12626, section 3.1).
    """
    return window + ratio / (ratio - 1)
