"""`framepack synthetic`: draw toy videos with captions, to try training."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal

from framepack_jax.cli.common import cli_errors, parse_size
from framepack_jax.utils.flags import parse
from framepack_jax.utils.progress import Bar


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Draw videos of coloured shapes that move as their captions say, with a .txt file beside
    each."""

    output: Path
    """Folder of the videos."""
    clips: int = 64
    """Number of videos."""
    seed: int = 0
    """Seed of the scenes."""
    seconds: float = 5.0
    """Length of each video, at 30 frames a second."""
    size: str = "128x128"
    """HEIGHTxWIDTH in pixels; or buckets, for several shapes of about 128x128 pixels."""
    split: Literal["train", "held-out"] = "train"
    """held-out: each video shows a form in a colour that no training video shows together."""
    walls: float = 0.25
    """Share of the videos with a wall that hides a shape for a while, where there is room."""
    workers: int = 2
    """Number of processes."""


def main(args: list[str] | None = None, prog: str = "framepack synthetic") -> None:
    """Parse flags and run; user errors end with a message and exit code 1."""
    flags = parse(Synthetic, args, prog)
    with cli_errors(duration=True):
        _run(flags)
        print(f"{flags.output}: {flags.clips} videos of {flags.seconds:g} s with captions")


def _run(flags: Synthetic) -> None:
    size = None
    if flags.size != "buckets":
        size = parse_size("--size", flags.size, multiple=2)
        if min(size) < 16:
            raise ValueError(f"--size {flags.size}: expected at least 16 pixels a side, or buckets")
    if flags.clips < 1 or not flags.seconds > 0 or flags.workers < 1:
        raise ValueError(
            f"--clips {flags.clips}, --seconds {flags.seconds}, --workers {flags.workers}: expected"
            " numbers above 0"
        )
    if not 0 <= flags.walls <= 1:
        raise ValueError(f"--walls {flags.walls:g}: expected a share from 0 to 1")
    from framepack_jax.toy import world

    flags.output.mkdir(parents=True, exist_ok=True)
    # Spawn the processes: a process with threads, such as those of JAX, cannot be forked safely.
    with ProcessPoolExecutor(flags.workers, multiprocessing.get_context("spawn")) as pool:
        made = [
            pool.submit(
                world.write,
                flags.output,
                i,
                flags.seed,
                flags.seconds,
                size,
                flags.split,
                flags.walls,
            )
            for i in range(flags.clips)
        ]
        for each in Bar(made, desc="drawing", unit="clip"):
            each.result()
