"""`framepack inspect`: describe a checkpoint, LoRA file, pipeline folder, bundle or video."""

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from framepack_jax.cli.common import cli_errors
from framepack_jax.utils.flags import parse


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Describe a checkpoint, LoRA file, pipeline folder or bundle, without reading its weights; or
    the settings in a video that this package made."""

    path: Annotated[str, Positional]
    """A file or folder, or a bundle of this package by its name."""


def main(args: list[str] | None = None, prog: str = "framepack inspect") -> None:
    """Parse flags and print the description; user errors end with one line and exit code 1."""
    flags = parse(Inspect, args, prog)
    from framepack_jax import bundle
    from framepack_jax.conversion.inspect import describe
    from framepack_jax.jobs import video_tags
    from framepack_jax.parallel import hardware

    hardware.quiet_libtpu()
    with cli_errors():
        path = Path(bundle.resolve(flags.path))
        print(video_tags.describe(path) if path.suffix == ".mp4" else describe(path))
