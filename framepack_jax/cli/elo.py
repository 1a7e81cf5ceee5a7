"""`framepack elo`: write a page that shows videos of several methods blind, for human votes."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from framepack_jax.cli.common import cli_errors
from framepack_jax.utils.flags import parse

MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Elo:
    """Write a page that plays two videos side by side, blind, and keeps the votes of a rater.

    Pairs are runs of different methods with the same start image, prompt and seed. The output
    folder holds index.html and videos/; open index.html in a browser, also without a network or on
    a phone. The page saves a file of votes: framepack elo-ratings VOTES.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Two or more methods, RUNS_A RUNS_B: for each a run folder, or a folder of run folders as
    framepack sample makes for several prompts, seeds or jobs. Folder names are the names of the
    methods."""
    output: Path | None = None
    """Folder of the page, new or empty."""
    seed: int = 0
    """Seed of the sides and of the order of the pairs."""


def main(args: list[str] | None = None, prog: str = "framepack elo") -> None:
    """Parse flags and write the page; user errors end with one line and exit code 1."""
    flags = parse(Elo, args, prog)
    with cli_errors():
        if flags.output is None:
            raise ValueError("--output is missing: give a folder for the page")
        if not 0 <= flags.seed <= MAX_SEED:
            raise ValueError(f"--seed {flags.seed}: expected 0 to {MAX_SEED}")
        print(_write(flags.runs, flags.output, flags.seed))


def _write(folders: tuple[Path, ...], output: Path, seed: int) -> str:
    """Write the page; return what was written. Raises ValueError, OSError."""
    from framepack_jax.evaluation.elo import page, runs

    page.check_output(output)
    methods = runs.read_methods(folders)
    pairs = runs.match(folders, methods)
    index = page.write(output, _names(folders), pairs, seed)
    text = f"{index}: {len(pairs)} pairs of {len(folders)} methods"
    if left := runs.unmatched(methods, pairs):
        others = "\n".join(f"  {run.folder}" for run in left)
        text += f"\n{len(left)} runs have no counterpart and are left out:\n{others}"
    return text


def _names(folders: tuple[Path, ...]) -> list[str]:
    """Return short names of the methods, the paths if two folders have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
