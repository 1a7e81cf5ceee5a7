"""The tables of docs/scale.md: python scripts/dry_runs.py [--no-decoding] [MACHINE ...].

Compiles the released model's programs for each machine, one after another, prints what each dry run
reports, and writes its rows between the markers of docs/scale.md, whole or not at all. Rows of
other machines stay. `make dry-runs` does so for all. Where the compiler of a machine is not
installed, that is said, its rows stay, and the exit code is 1.
"""

import os
import re
import sys
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA writes of programs that do not fit; so do the rows.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from framepack_jax import topology
from framepack_jax.commands.dry_run import Program, Report, dry_run
from framepack_jax.commands.records import path_of
from framepack_jax.commands.shots import open_pipe
from framepack_jax.pipeline import Settings
from framepack_jax.request import Request, lay_out

BUNDLE, HEIGHT, WIDTH = "framepack_i2v", 608, 640
FITS = (
    "v5e:4x4", "v5p:2x4x4", "v6e:2x2", "v6e:2x4", "v6e:8x8", "a100-80g:8", "h100:8", "h100:64",
    "h200:1", "rtx4090:1",
)  # fmt: skip
CURVE = (
    "v5e:2x2", "v5e:2x4", "v5e:4x4", "v6e:2x2", "v6e:2x4", "h100:1", "h100:2", "h100:4", "h100:8",
    "h100:64",
)  # fmt: skip
# For a TPU the decoder takes minutes to compile.
DECODE = ("v5e:2x2", "v5e:4x4", "h100:8", "h200:1", "rtx4090:1")
DOCUMENT = Path(__file__).parent.parent / "docs" / "scale.md"
GB = 1e9


def main(flags: list[str]) -> None:
    """Compile for the machines among the flags, or for all."""
    decode = DECODE if "--no-decoding" not in flags else ()
    names = [flag for flag in flags if flag != "--no-decoding"]
    names = names or list(dict.fromkeys([*FITS, *CURVE]))
    if unknown := set(names) - {*FITS, *CURVE}:
        raise SystemExit(f"error: no rows for {sorted(unknown)}; there are {FITS + CURVE}")
    problems = []
    for name in names:
        try:
            report = report_of(name, name in decode)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        print(f"{report}\n", flush=True)
        if name in FITS:
            write_row("fits", name, FITS, fits_cells(report))
        if name in CURVE:
            write_row("curve", name, CURVE, curve_cells(report))
        if name in decode:
            write_row("decoding", name, DECODE, memory_cells(report, report.programs[1]))
    if problems:
        raise SystemExit("\n".join(["error: not compiled:", *problems]))


def report_of(name: str, decode: bool) -> Report:
    """What `sample.py --dry-run` reports of a machine. Raises ValueError."""
    path = path_of(BUNDLE)
    pipe = open_pipe(path, "bfloat16", None, None)
    layout = lay_out(pipe.geometry, Request("", None), sections=1, height=HEIGHT, width=WIDTH)
    return dry_run(pipe, path, layout, Settings(), topology.parse(name), decode=decode)


def fits_cells(report: Report) -> list[str]:
    return [divided(report), gigabytes(report.resident), *memory_cells(report, report.step)]


def memory_cells(report: Report, program: Program) -> list[str]:
    total, capacity = program.total(report.resident), report.machine.chip.memory
    return [
        gigabytes(program.temporaries),
        f"{total / GB:.1f} of {capacity / GB:.1f} GB",
        "yes" if total <= capacity else f"**no**, {(total - capacity) / GB:.1f} GB too much",
        compiled(report, program.compile_seconds),
    ]


def curve_cells(report: Report) -> list[str]:
    traffic = ", ".join(
        f"{kind} {moved.bytes / GB:.1f}"
        for kind, moved in report.step.collectives.items()
        if moved.bytes >= 0.05 * GB
    )
    links, step = report.link_seconds, report.step_seconds
    section = step * report.steps
    return [
        divided(report),
        "yes" if report.step.total(report.resident) <= report.machine.chip.memory else "no",
        f"{report.floor_seconds:.3f} s",
        traffic or "none",
        f"{links:.3f} s",
        f"{step:.3f} s",
        f"{section:.1f} s",
        f"{section / report.frames:.2f} s",
    ]


def divided(report: Report) -> str:
    return ", ".join(f"{axis} {n}" for axis, n in report.mesh.items() if n > 1) or "one chip"


def gigabytes(size: int) -> str:
    return f"{size / GB:.2f} GB"


def compiled(report: Report, seconds: float) -> str:
    package = "libtpu" if report.machine.chip.dims else "jax-cuda13-plugin"
    return f"{seconds:.0f} s, {package} {metadata.version(package)}"


def write_row(table: str, name: str, order: tuple[str, ...], cells: list[str]) -> None:
    """Put a row in its place in a table of the document."""
    text = DOCUMENT.read_text()
    start, end = f"<!-- {table} -->\n", f"<!-- end of {table} -->\n"
    if text.count(start) != 1 or text.count(end) != 1:
        raise SystemExit(f"error: {DOCUMENT} needs the lines {start.strip()} and {end.strip()}")
    before, rest = text.split(start)
    body, after = rest.split(end)
    lines = body.splitlines()
    rows = {re.match(r"\| `([^`]+)`", line)[1]: line for line in lines[2:]}
    rows[name] = f"| `{name}` | " + " | ".join(cells) + " |"
    body = "\n".join([*lines[:2], *(rows[each] for each in order if each in rows)])
    partial = DOCUMENT.with_suffix(".partial")
    partial.write_text(f"{before}{start}{body}\n{end}{after}")
    partial.replace(DOCUMENT)


if __name__ == "__main__":
    main(sys.argv[1:])
