"""`framepack elo-ratings`: ratings of methods from files of votes."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from framepack_jax.cli.common import cli_errors
from framepack_jax.utils.flags import parse


@dataclasses.dataclass(frozen=True)
class EloRatings:
    """Print ELO ratings of methods, with their errors, from the votes that a page of framepack elo
    saves."""

    votes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of votes: one for each rater, also of several pages with the same methods."""
    output: Path | None = None
    """Folder for ratings.md and ratings.json."""
    seed: int = 0
    """Seed of the random orders and of the bootstrap."""


def main(args: list[str] | None = None, prog: str = "framepack elo-ratings") -> None:
    """Parse flags and print ratings; user errors end with one line and exit code 1."""
    flags = parse(EloRatings, args, prog)
    with cli_errors():
        if flags.seed < 0:
            raise ValueError(f"--seed {flags.seed}: expected 0 or more")
        from framepack_jax.evaluation.elo import report, votes

        found = report.results(votes.read(flags.votes), flags.seed)
        print(report.markdown(found))
        if flags.output is not None:
            report.write(flags.output, found)
