"""`framepack inspect`: describe a checkpoint, LoRA file, pipeline folder or bundle."""

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from framepack_jax.cli.common import cli_errors
from framepack_jax.utils.flags import parse


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Describe a checkpoint, LoRA file, pipeline folder or bundle, without reading its weights."""

    path: Annotated[str, Positional]
    """A file or folder, or a bundle of this package by its name."""


def main(args: list[str] | None = None, prog: str = "framepack inspect") -> None:
    """Parse flags and print the description; user errors end with one line and exit code 1."""
    flags = parse(Inspect, args, prog)
    from framepack_jax import bundle
    from framepack_jax.conversion.inspect import describe
    from framepack_jax.parallel import hardware

    hardware.quiet_libtpu()
    with cli_errors():
        print(describe(Path(bundle.resolve(flags.path))))
