"""`framepack fit-codebook`: fit a history codebook to the latents of a dataset."""

import dataclasses
from typing import Annotated

from framepack_jax.cli.common import cli_errors
from framepack_jax.utils import fields
from framepack_jax.utils.fields import Range
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import FILES_IN_STORES


@dataclasses.dataclass(frozen=True)
class FitCodebook:
    """Fit a codebook of latent pixels for discretized history, as schedules with +D read it."""

    data: Annotated[str, FILES_IN_STORES]
    """Folder of a dataset with latents, written by framepack prepare."""
    output: Annotated[str, FILES_IN_STORES]
    """File to write, for --codebook of train.py."""
    entries: Annotated[int, Range(at_least=1, at_most=65536)] = 128
    """Number of entries, the number after +D."""
    pixels: Annotated[int, Range(at_least=1, at_most=10**8)] = 1_000_000
    """Maximum number of latent pixels to fit to, drawn evenly over the clips."""
    seed: int = 0
    """Seed of the draw and of the first entries."""
    overwrite: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        fields.check(self)


def main(args: list[str] | None = None, prog: str = "framepack fit-codebook") -> None:
    """Parse flags and fit; user errors end with one line and exit code 1."""
    flags = parse(FitCodebook, args, prog)
    from etils import epath

    from framepack_jax.bundle.codebook import write_codebook
    from framepack_jax.data.latent_pixels import draw_pixels
    from framepack_jax.packing.codebook import fit

    with cli_errors(duration=True):
        if epath.Path(flags.output).exists() and not flags.overwrite:
            raise ValueError(f"{flags.output} exists; choose another --output, or --overwrite")
        epath.Path(flags.output).parent.mkdir(parents=True, exist_ok=True)
        pixels = draw_pixels(flags.data, flags.pixels, flags.seed)
        found = fit(pixels, flags.entries, flags.seed)
        write_codebook(flags.output, found, f"{len(pixels)} latent pixels of {flags.data}")
        used = int((found.usage > 0).sum())
        print(
            f"{flags.output}: {used} of {flags.entries} entries are used, the most used for"
            f" {found.usage[0]:.1%} of {len(pixels):,} latent pixels; mean squared error"
            f" {found.error:.1%} of the variance"
        )
