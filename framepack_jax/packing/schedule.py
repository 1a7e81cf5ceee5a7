"""The packing schedule: which frames a section reads, how strongly compressed, as one string.

Source: arXiv 2504.12626, sections 3.1 to 3.4, whose variant strings are the grammar here.

    schedule = item ("_" item)* ["+D" [number]]      f1k1_x_g9_f1k1f2k2f16k4_td
    item     = context | "g" frames | "x" | tail
    context  = ("f" frames kernel)+                  contiguous frames, earlier to the left
    kernel   = "k" n | "k" t "h" h "w" w             k1 = (1,2,2), k2 = (2,4,4), k4 = (4,8,8), ...
    tail     = "td" | "ta" | "tc"                    delete | append | compress the far history

Items stand in time order. The *order* says in which sequence sections are generated; by
default it is that of the released models, or the paper, for a schedule of this form.
"""

import dataclasses
import re

RELEASED_INVERTED = "f1k1_x_g9_f1k1f2k2f16k4_td"
RELEASED_F1 = "f1k1_x_f16k4f2k2f1k1_g9"
DEFAULT_CODEBOOK = 128

_NUMBER = "[1-9][0-9]*"
_SEGMENT = re.compile(rf"f({_NUMBER})(k{_NUMBER}(?:h{_NUMBER}w{_NUMBER})?)")
_KERNEL = re.compile(rf"k({_NUMBER})(?:h({_NUMBER})w({_NUMBER}))?")


class ScheduleError(ValueError):
    """A schedule or order that cannot be parsed, or cannot be sampled."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Contiguous frames under one patch kernel, `f16k4`."""

    frames: int
    kernel: str

    def __str__(self) -> str:
        return f"f{self.frames}{self.kernel}"


@dataclasses.dataclass(frozen=True)
class Context:
    """Contiguous context frames, `f1k1f2k2f16k4`."""

    segments: tuple[Segment, ...]

    @property
    def frames(self) -> int:
        return sum(segment.frames for segment in self.segments)

    def __str__(self) -> str:
        return "".join(map(str, self.segments))


@dataclasses.dataclass(frozen=True)
class Generate:
    """Frames to generate, `g9`: the latent window of a section."""

    frames: int

    def __str__(self) -> str:
        return f"g{self.frames}"


@dataclasses.dataclass(frozen=True)
class Skip:
    """Frames that are skipped, `x`."""

    def __str__(self) -> str:
        return "x"


@dataclasses.dataclass(frozen=True)
class Tail:
    """Treatment of history beyond the schedule: `td`, `ta` or `tc`."""

    kind: str

    def __str__(self) -> str:
        return self.kind


Item = Context | Generate | Skip | Tail


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A parsed schedule with its order; `str` returns the text that was parsed.

    `discretize` is None, or the text after "+D": "" for the default codebook size, or a number.
    """

    items: tuple[Item, ...]
    order: str
    discretize: str | None = None

    def __str__(self) -> str:
        suffix = "" if self.discretize is None else f"+D{self.discretize}"
        return "_".join(map(str, self.items)) + suffix

    @property
    def window(self) -> int:
        """Latent window: frames of the only `g`. Raises ScheduleError unless there is one."""
        windows = [item.frames for item in self.items if isinstance(item, Generate)]
        if len(windows) != 1:
            raise ScheduleError(f"schedule {self} has {len(windows)} items g, expected one")
        return windows[0]

    def with_window(self, window: int) -> "Schedule":
        """Return the schedule with another window. Raises ScheduleError unless it has one."""
        old = Generate(self.window)
        items = tuple(Generate(window) if item == old else item for item in self.items)
        return dataclasses.replace(self, items=items)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments of context in time order."""
        contexts = (item for item in self.items if isinstance(item, Context))
        return tuple(segment for context in contexts for segment in context.segments)

    @property
    def reads_ahead(self) -> bool:
        """True if sections read frames that come after them, as the end of a video."""
        return self.order == "inverted"

    @property
    def codebook(self) -> int | None:
        """Number of entries of the history codebook; None without discretization."""
        return None if self.discretize is None else int(self.discretize or DEFAULT_CODEBOOK)


def parse(text: str, order: str | None = None) -> Schedule:
    """Parse a schedule; without an `order`, take the usual one for its form.

    Raises ScheduleError that names the item which cannot be parsed.
    """
    body, plus, discretize = text.partition("+")
    if plus and not re.fullmatch(rf"D({_NUMBER})?", discretize):
        raise ScheduleError(
            f"schedule {text!r}: cannot read {plus + discretize!r}; expected +D or +D128"
        )
    items = tuple(_parse_item(item, text) for item in body.split("_"))
    return Schedule(items, order or _default_order(items), discretize[1:] if plus else None)


def _parse_item(item: str, schedule: str) -> Item:
    if item == "x":
        return Skip()
    if item in ("td", "ta", "tc"):
        return Tail(item)
    if re.fullmatch(f"g{_NUMBER}", item):
        return Generate(int(item[1:]))
    if item and re.fullmatch(f"(?:{_SEGMENT.pattern})+", item):
        return Context(tuple(Segment(int(m[1]), m[2]) for m in _SEGMENT.finditer(item)))
    raise ScheduleError(
        f"schedule {schedule!r}: cannot read item {item!r}; expected frames with kernels"
        " (f1k1f2k2), frames to generate (g9), a gap (x) or a tail (td, ta, tc)"
    )


def kernel_shape(kernel: str) -> tuple[int, int, int]:
    """Return (time, height, width) of a kernel name in latent cells: "k2" -> (2, 4, 4)."""
    match = _KERNEL.fullmatch(kernel)
    if not match:
        raise ScheduleError(f"kernel {kernel!r}: expected a name such as k1, k4 or k1h4w4")
    time, height, width = match.groups()
    return int(time), int(height or 2 * int(time)), int(width or 2 * int(time))


def _default_order(items: tuple[Item, ...]) -> str:
    """Return the order of the released models, or of the paper; "" if nothing is generated."""
    windows = [i for i, item in enumerate(items) if isinstance(item, Generate)]
    if not windows:
        return ""
    after = any(isinstance(item, Context) for item in items[windows[0] + 1 :])
    before = windows[0] > 0 and isinstance(items[windows[0] - 1], Context)
    return "endpoint" if before and after else "inverted" if after else "forward"
