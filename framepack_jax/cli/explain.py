"""`framepack explain`: draw the context of a packing schedule."""

import dataclasses
from typing import Annotated

import tyro

from framepack_jax.cli.common import cli_errors
from framepack_jax.utils.flags import parse


@dataclasses.dataclass(frozen=True)
class Explain:
    """Draw the context of a packing schedule: items, frames, kernels, tokens, fractions, total."""

    schedule: Annotated[str, tyro.conf.Positional] = "f1k1_x_g9_f1k1f2k2f16k4_td"
    """Packing schedule, for example f1k1_x_f16k4f2k2f1k1_g9."""
    height: int = 608
    """Height of the video in pixels."""
    width: int = 640
    """Width of the video in pixels."""
    cell: int = 8
    """Side of a latent cell in pixels (8 for the HunyuanVideo VAE)."""
    sections: int = 3
    """Number of sections whose reads are listed."""


def main(args: list[str] | None = None, prog: str = "framepack explain") -> None:
    """Parse flags and print; an invalid schedule ends with one line."""
    flags = parse(Explain, args, prog)
    with cli_errors():
        _check(flags)
        from framepack_jax import packing
        from framepack_jax.packing.diagram import diagram

        schedule = packing.parse(flags.schedule)
        print(diagram(schedule, flags.height, flags.width, flags.cell, flags.sections))


def _check(flags: Explain) -> None:
    if min(flags.height, flags.width) < 2 * flags.cell or flags.cell < 1:
        raise ValueError(
            f"{flags.height} x {flags.width} pixels are too few for cells of {flags.cell}:"
            f" expected at least {2 * flags.cell} on each side"
        )
    if flags.sections < 1:
        raise ValueError(f"sections = {flags.sections}: expected at least 1")
