"""Draw a packing schedule as text: what it packs into the context, and its number of tokens."""

from framepack_jax.packing.kernels import ScheduleError, kernel_shape
from framepack_jax.packing.orders import MISSING
from framepack_jax.packing.schedule import Context, Generate, Schedule, Skip, Tail
from framepack_jax.packing.sections import plan
from framepack_jax.packing.tokens import context_tokens, frame_bound, group_tokens

BAR = 32


def diagram(schedule: Schedule, height: int, width: int, cell: int, sections: int) -> str:
    """Draw a schedule for a video of height x width pixels, with the reads of its first sections.

    `cell` is the side of a latent cell in pixels. Raises ScheduleError if the schedule generates
    nothing.
    """
    rows, columns = height // cell, width // cell
    if not schedule.order:
        raise ScheduleError(f"schedule {schedule} generates nothing: it has no item g")
    parts = [
        f"{schedule}   order: {schedule.order}",
        f"{height} x {width} pixels = {rows} x {columns} latent cells",
        "",
        _table(schedule, rows, columns),
        "",
        _reads(schedule, sections),
    ]
    return "\n".join(parts)


def _table(schedule: Schedule, rows: int, columns: int) -> str:
    """Return one line per item in order of time: frames, kernel, tokens, fraction, and a bar."""
    frame = group_tokens(1, "k1", rows, columns)
    total, made = _total(schedule, rows, columns), _made(schedule)
    lines = [f"{'item':>8}  {'':8} frames    kernel  tokens  of all  each frame keeps"]
    for item in schedule.items:
        if isinstance(item, Context):
            segments = [(str(s), s.frames, s.kernel, "context") for s in item.segments]
        elif isinstance(item, Generate):
            segments = [(str(item), item.frames, "k1", "target")]
        elif isinstance(item, Tail) and schedule.tail:
            tail, _ = context_tokens(schedule, rows, columns)[-1]
            segments = [(str(item), tail.frames, tail.kernel, "older")]
        else:
            lines.append(f"{item!s:>8}  {'left out' if isinstance(item, Skip) else 'older'}")
            continue
        for name, frames, kernel, role in segments:
            tokens = group_tokens(frames, kernel, rows, columns)
            size = "x".join(map(str, kernel_shape(kernel)))
            bar = "#" * max(1, round(BAR * tokens / total))
            lines.append(
                f"{name:>8}  {role:8} {frames:6} {size:>9} {tokens:7}"
                f"  {tokens / total:6.1%}  {tokens / frames / frame:7.2%}  {bar}"
            )
    lines.append(f"{'total':>8}  {total} tokens, whatever the length of the video")
    if schedule.order == "endpoint":
        both = total + group_tokens(made, "k1", rows, columns)
        lines.append(f"{'':8}  {both} in the first pass, which makes the beginning and the end")
    lines.append(
        f"{'':8}  = {total / frame:.2f} whole frames, {made} of them targets; the paper's bound for"
        f" endless history\n{'':8}  (halving with age, anchors not counted) is"
        f" {frame_bound(made):g}"
    )
    return "\n".join(lines)


def _made(schedule: Schedule) -> int:
    return sum(item.frames for item in schedule.items if isinstance(item, Generate))


def _total(schedule: Schedule, rows: int, columns: int) -> int:
    context = sum(tokens for _, tokens in context_tokens(schedule, rows, columns))
    return context + group_tokens(_made(schedule), "k1", rows, columns)


def _reads(schedule: Schedule, sections: int) -> str:
    """List what each section writes and reads, or why the schedule cannot be sampled."""
    try:
        made = plan(schedule, sections)
    except ScheduleError as error:
        return f"not to be sampled: {error}"
    lines = [f"plan of {sections} sections (positions in latent frames, - is missing history):"]
    if schedule.importance:
        lines.append(f"in order of time; {schedule.importance} orders the frames by their content")
    for number, section in enumerate(made, 1):
        reads = "  ".join(f"{g.kernel}: {_positions(g.reads)}" for g in section.groups)
        lines.append(f"  {number}. makes {_positions(section.targets)}  reads {reads}")
    return "\n".join(lines)


def _positions(positions: tuple[int, ...]) -> str:
    """Shorten positions, (-1, -1, 0, 1, 2, 9) to "-, 0..2, 9"."""
    runs: list[list[int]] = []
    for position in positions:
        last = runs[-1][1] if runs else None
        if last is not None and position == (last if last == MISSING else last + 1):
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ", ".join(_run(*run) for run in runs)


def _run(first: int, last: int) -> str:
    if first == MISSING:
        return "-"
    return str(first) if first == last else f"{first}..{last}"
