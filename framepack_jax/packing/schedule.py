"""The packing schedule: which frames a section reads, how strongly compressed, as one string.

Source: arXiv 2504.12626, sections 3.1 to 3.4, whose variant strings are the grammar here.

    schedule = item ("_" item)* ["+D" [number]] ["~" importance] ["@" order]
    item     = context | "g" frames | "x" | tail
    context  = ("f" frames kernel)+                  contiguous frames, earlier to the left
    kernel   = "k" n | "k" t "h" h "w" w             k1 = (1,2,2), k2 = (2,4,4), k4 = (4,8,8), ...
    tail     = "td" | "ta" | "tc"                    delete | append | compress the far history
    importance = "cos" | "hybrid(" decimal ")"       of the history, in place of its time
    order    = "inverted" | "forward" | "endpoint" | "planned(" number ")"

Items stand in time order: f1k1_x_g9_f1k1f2k2f16k4_td. The *order* says in which sequence sections
are generated; by default it is that of the released models, or the paper, for a schedule of this
form. The grammar of an order and of importance is ours: the paper describes them in words.
"""

import dataclasses
import re

from framepack_jax.packing.kernels import KERNEL, NUMBER, ScheduleError, check_kernel

RELEASED_INVERTED = "f1k1_x_g9_f1k1f2k2f16k4_td"
RELEASED_F1 = "f1k1_x_f16k4f2k2f1k1_g9"
DEFAULT_CODEBOOK = 128

ORDERS = ("inverted", "forward", "endpoint", "planned")

_SEGMENT = re.compile(rf"f({NUMBER})({KERNEL})")
_IMPORTANCE = re.compile(r"cos|hybrid\(([0-9]+(?:\.[0-9]+)?)\)")
_ORDER = re.compile(rf"inverted|forward|endpoint|planned\(({NUMBER})\)")


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
    `importance` orders the history, see `packing.importance`; "" is by time.
    """

    items: tuple[Item, ...]
    order: str
    discretize: str | None = None
    importance: str = ""

    def __str__(self) -> str:
        suffix = "" if self.discretize is None else f"+D{self.discretize}"
        suffix += f"~{self.importance}" if self.importance else ""
        usual = self.order == _default_order(self.items)
        return "_".join(map(str, self.items)) + suffix + ("" if usual else f"@{self.order}")

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
        return self.order not in ("", "forward")

    @property
    def tail(self) -> str:
        """Name of the group of frames beyond the schedule, ta_k4, with the kernel nearest to it; ""
        if they are left out."""
        for i, item in enumerate(self.items):
            if isinstance(item, Tail) and item.kind != "td":
                last = i == len(self.items) - 1
                near = self.items[i - 1 if last else i + 1]
                if isinstance(near, Context):
                    return f"{item.kind}_{near.segments[-1 if last else 0].kernel}"
        return ""

    @property
    def stride(self) -> int:
        """Sections from one planned endpoint to the next; 0 in other orders."""
        match = _ORDER.fullmatch(self.order)
        return int(match[1] or 0) if match else 0

    @property
    def nearness(self) -> float:
        """Weight of nearness in time beside similarity, lambda of equation 5."""
        match = _IMPORTANCE.fullmatch(self.importance)
        return float(match[1] or 0) if match else 0.0

    @property
    def codebook(self) -> int | None:
        """Number of entries of the history codebook; None without discretization."""
        return None if self.discretize is None else int(self.discretize or DEFAULT_CODEBOOK)


def parse(text: str, order: str | None = None) -> Schedule:
    """Parse a schedule; without an `order`, take its own, or the usual one for its form.

    Raises ScheduleError that names the item, kernel or order that cannot be parsed, and the kernel
    that no weights can embed.
    """
    whole, at, own = text.partition("@")
    whole, tilde, importance = whole.partition("~")
    body, plus, discretize = whole.partition("+")
    if plus and not re.fullmatch(rf"D({NUMBER})?", discretize):
        raise ScheduleError(
            f"schedule {text!r}: cannot read {plus + discretize!r}; expected +D or +D128"
        )
    items = tuple(_parse_item(item, text) for item in body.split("_"))
    if at and order not in (None, own):
        raise ScheduleError(f"schedule {text!r}: it names another order than {order!r}")
    order = own if at else order or _default_order(items)
    if (order and not _ORDER.fullmatch(order)) or (at and not own):
        raise ScheduleError(
            f"schedule {text!r}: order {order!r}: expected inverted, forward, endpoint or, with the"
            " number of sections from one endpoint to the next, planned(4)"
        )
    schedule = Schedule(items, order, discretize[1:] if plus else None, importance)
    if tilde:
        _check_importance(schedule, text)
    return schedule


def _check_importance(schedule: Schedule, text: str) -> None:
    """Raise ScheduleError if the history cannot be ordered by importance."""
    where = f"schedule {text!r}: importance {schedule.importance!r}"
    if not _IMPORTANCE.fullmatch(schedule.importance):
        raise ScheduleError(f"{where}: expected ~cos, or with the weight of time, ~hybrid(1)")
    if schedule.order != "forward":
        raise ScheduleError(
            f"{where} in order {schedule.order!r}: expected the order forward, whose history is all"
            " that comes before a section"
        )
    if schedule.tail:
        raise ScheduleError(
            f"{where} with the tail {schedule.tail[:2]}: a tail is the frames that are far in time;"
            " expected td"
        )
    if not schedule.segments:
        raise ScheduleError(f"{where}: the schedule reads no history")


def _parse_item(item: str, schedule: str) -> Item:
    if item == "x":
        return Skip()
    if item in ("td", "ta", "tc"):
        return Tail(item)
    if re.fullmatch(f"g{NUMBER}", item):
        return Generate(int(item[1:]))
    if item and re.fullmatch(f"(?:{_SEGMENT.pattern})+", item):
        segments = tuple(Segment(int(m[1]), m[2]) for m in _SEGMENT.finditer(item))
        for segment in segments:
            check_kernel(segment.kernel)
        return Context(segments)
    raise ScheduleError(
        f"schedule {schedule!r}: cannot read item {item!r}; expected frames with kernels"
        " (f1k1f2k2), frames to generate (g9), a gap (x) or a tail (td, ta, tc)"
    )


def _default_order(items: tuple[Item, ...]) -> str:
    """Return the order of the released models, or of the paper; "" if nothing is generated."""
    windows = [i for i, item in enumerate(items) if isinstance(item, Generate)]
    if not windows:
        return ""
    after = any(isinstance(item, Context) for item in items[windows[0] + 1 :])
    before = windows[0] > 0 and isinstance(items[windows[0] - 1], Context)
    return "endpoint" if before and after else "inverted" if after else "forward"
