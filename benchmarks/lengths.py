"""Compare the cost of a section in long and in short videos.

    python benchmarks/lengths.py [--bundle tiny] [--schedule SCHEDULE ...] [--seconds 6 20 60]
        [--repeats 5] [--json FILE]

Makes a video of each length, under each schedule, with `sample.py`, in a process of its own, one or
several times. Reads from the run records the seconds of every section and the peak memory: of the
device if it reports its memory, else of the process. Counts the programs of a denoising step that a
process compiles: one for each length of a pass, whatever the number of sections.
"""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parent.parent
# At the beginning programs are compiled or read, a section later those for frames, which the device
# meanwhile decodes; and the last section decodes more.
SETTLED = 3


@dataclasses.dataclass(frozen=True)
class LengthBenchmark:
    """Measure videos of some lengths, one after the other."""

    bundle: str = "tiny"
    """The bundle."""
    schedule: tuple[str, ...] = ()
    """Packing schedules; default: that of the bundle."""
    seconds: tuple[float, ...] = (6.0, 20.0, 60.0)
    """Lengths; the shortest needs five sections."""
    steps: int = 10
    """Denoising steps a section."""
    flags: tuple[str, ...] = ()
    """More flags of sample.py, without their dashes: height=64 width=80."""
    image: Path | None = ROOT / "examples" / "sprites.png"
    """First frame; None: from text, as Helios."""
    repeats: int = 1
    """Videos of each length. The table has the medians of their figures."""
    json: Path | None = None
    """Keep the figures here."""


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and return the figures of each length."""
    config = tyro.cli(LengthBenchmark, prog="benchmarks/lengths.py", args=args)
    try:
        made = [
            median_of(config, seconds, schedule)
            for schedule in config.schedule or (None,)
            for seconds in config.seconds
        ]
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    print(table(made))
    if config.json is not None:
        config.json.write_text(json.dumps(made, indent=1))
    return made


def median_of(
    config: LengthBenchmark, seconds: float, schedule: str | None = None
) -> dict[str, Any]:
    """Medians of the figures of several videos of one length, with the seconds of a section in each
    of them, "each". Raises as `measure`."""
    made = [measure(config, seconds, schedule) for _ in range(config.repeats)]
    medians = {name: statistics.median(row[name] for row in made) for name in made[0]}
    named = {} if schedule is None else {"schedule": schedule}
    return named | medians | {"each": [row["section"] for row in made]}


def measure(config: LengthBenchmark, seconds: float, schedule: str | None = None) -> dict[str, Any]:
    """Figures of one length. Raises RuntimeError where sampling fails, ValueError for a video too
    short to tell its sections apart."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "sample.py"), "--bundle", config.bundle,
            "--prompt", "the shapes move", "--overwrite",
            *(["--image", str(config.image)] if config.image else []),
            *(["--schedule", schedule] if schedule else []),
            "--seconds", str(seconds), "--steps", str(config.steps), "--output", folder,
            *(f"--{flag}" for flag in config.flags),
        ]  # fmt: skip
        env = os.environ | {"JAX_LOG_COMPILES": "1"}
        done = subprocess.run(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise RuntimeError(f"sample.py ended with {done.returncode}: {done.stderr[-500:]}")
        record = json.loads((Path(folder) / "run.json").read_text())
    programs = len(re.findall(r"Compiling jit\(_step\) with", done.stderr))
    return {"seconds": seconds, "programs": programs} | figures(record["timings"])


def figures(timings: dict[str, Any]) -> dict[str, Any]:
    """Summarize the timings of a run: medians of settled sections, in seconds; those of the last
    third over those of the first; bytes of memory. Raises ValueError for too few sections."""
    sections = timings["section_seconds"]
    settled = sections[SETTLED:-1]
    if not settled:
        raise ValueError(
            f"a video of {len(sections)} sections: expected {SETTLED + 2} at least, give more"
            " seconds"
        )
    third = max(1, len(settled) // 3)
    return {
        "sections": len(sections),
        "section": statistics.median(settled),
        "growth": statistics.median(settled[-third:]) / statistics.median(settled[:third]),
        "memory": timings["peak_memory_bytes"],
    }


def table(made: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a row for each length."""
    lines = [
        "| schedule | length | sections | a section | in each video | last third / first |"
        " programs of a step | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in made:
        lines.append(
            f"| {row.get('schedule', 'of the bundle')} | {row['seconds']:g} s | {row['sections']}"
            f" | {row['section']:.2f} s | {min(row['each']):.2f} to {max(row['each']):.2f} s"
            f" | {row['growth']:.2f} | {row['programs']} | {row['memory'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
