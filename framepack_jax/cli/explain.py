"""`framepack explain`: draw what a schedule packs into the context, and how long it is."""

import dataclasses
from typing import Annotated

import tyro

from framepack_jax import packing
from framepack_jax.packing import Context, Generate, Skip
from framepack_jax.utils.flags import parse

BAR = 32


@dataclasses.dataclass(frozen=True)
class Explain:
    """Draw the context of a schedule: groups, frames, kernels, tokens, shares, total."""

    schedule: Annotated[str, tyro.conf.Positional] = packing.RELEASED_INVERTED
    """Packing schedule, for example f1k1_x_f16k4f2k2f1k1_g9."""
    height: int = 608
    """Height of the video in pixels."""
    width: int = 640
    """Width of the video in pixels."""
    cell: int = 8
    """Pixels along one side of a latent cell (8 for the HunyuanVideo VAE)."""
    sections: int = 3
    """Sections whose reads are listed."""


def main(args: list[str] | None = None, prog: str = "framepack explain") -> None:
    """Parse flags and print; a schedule that cannot be read ends with one line."""
    settings = parse(Explain, args, prog)
    try:
        print(explain(settings))
    except packing.ScheduleError as error:
        raise SystemExit(f"error: {error}") from error


def explain(settings: Explain) -> str:
    """The drawing as text. Raises ScheduleError for what cannot be read."""
    if min(settings.height, settings.width) < 2 * settings.cell or settings.cell < 1:
        raise SystemExit(
            f"error: {settings.height} x {settings.width} pixels are too few for cells of"
            f" {settings.cell}: expected at least {2 * settings.cell} on each side"
        )
    if settings.sections < 1:
        raise SystemExit(f"error: sections = {settings.sections}: expected at least 1")
    schedule = packing.parse(settings.schedule)
    rows, columns = settings.height // settings.cell, settings.width // settings.cell
    if not schedule.order:
        raise packing.ScheduleError(f"schedule {schedule} generates nothing: it has no item g")
    parts = [
        f"{schedule}   order: {schedule.order}",
        f"{settings.height} x {settings.width} pixels = {rows} x {columns} latent cells",
        "",
        _table(schedule, rows, columns),
        "",
        _reads(schedule, settings.sections),
    ]
    return "\n".join(parts)


def _table(schedule: packing.Schedule, rows: int, columns: int) -> str:
    """One line an item in time order: frames, kernel, tokens, share, and a bar of its tokens."""
    frame = packing.group_tokens(1, "k1", rows, columns)
    total, made = _total(schedule, rows, columns), _made(schedule)
    lines = [f"{'item':>8}  {'':8} frames    kernel  tokens  of all  each frame keeps"]
    for item in schedule.items:
        if isinstance(item, Context):
            segments = [(str(s), s.frames, s.kernel, "context") for s in item.segments]
        elif isinstance(item, Generate):
            segments = [(str(item), item.frames, "k1", "made")]
        else:
            lines.append(f"{item!s:>8}  {'left out' if isinstance(item, Skip) else 'older'}")
            continue
        for name, frames, kernel, role in segments:
            tokens = packing.group_tokens(frames, kernel, rows, columns)
            size = "x".join(map(str, packing.kernel_shape(kernel)))
            bar = "#" * max(1, round(BAR * tokens / total))
            lines.append(
                f"{name:>8}  {role:8} {frames:6} {size:>9} {tokens:7}"
                f"  {tokens / total:6.1%}  {tokens / frames / frame:7.2%}  {bar}"
            )
    lines.append(f"{'total':>8}  {total} tokens, whatever the length of the video")
    lines.append(
        f"{'':8}  = {total / frame:.2f} whole frames, {made} of them made; the paper's bound for"
        f" endless history\n{'':8}  (halving with age, anchors not counted) is"
        f" {packing.frame_bound(made):g}"
    )
    return "\n".join(lines)


def _made(schedule: packing.Schedule) -> int:
    return sum(item.frames for item in schedule.items if isinstance(item, Generate))


def _total(schedule: packing.Schedule, rows: int, columns: int) -> int:
    context = sum(tokens for _, tokens in packing.context_tokens(schedule, rows, columns))
    return context + packing.group_tokens(_made(schedule), "k1", rows, columns)


def _reads(schedule: packing.Schedule, sections: int) -> str:
    """What each section writes and reads, or why it cannot be sampled."""
    try:
        plan = packing.plan(schedule, sections)
    except packing.ScheduleError as error:
        return f"not to be sampled: {error}"
    lines = [f"plan of {sections} sections (positions in latent frames, - is missing history):"]
    for number, section in enumerate(plan, 1):
        reads = "  ".join(f"{g.kernel}: {_positions(g.reads)}" for g in section.groups)
        lines.append(f"  {number}. makes {_positions(section.targets)}  reads {reads}")
    return "\n".join(lines)


def _positions(positions: tuple[int, ...]) -> str:
    """(-1, -1, 0, 1, 2) -> "-, 0..2": the missing, then the known, which are contiguous."""
    known = [p for p in positions if p != packing.MISSING]
    if not known:
        return "-"
    span = str(known[0]) if len(known) == 1 else f"{known[0]}..{known[-1]}"
    if len(known) == len(positions):
        return span
    return f"-, {span}" if positions[0] == packing.MISSING else f"{span}, -"
