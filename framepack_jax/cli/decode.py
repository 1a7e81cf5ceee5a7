"""`framepack decode`: decode the saved latents of a run."""

import dataclasses
from dataclasses import field
from typing import Annotated

from etils import epath
from tyro.conf import OmitArgPrefixes, Positional

from framepack_jax.cli.common import ALONE, MultihostFlags
from framepack_jax.jobs.spec import ComputeOptions
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import FILES_IN_STORES, IN_STORES


@dataclasses.dataclass(frozen=True)
class Decode:
    """Decode all sections that a run has so far, and nothing else.

    All options of the video come from the run.
    """

    folder: Annotated[epath.Path, FILES_IN_STORES, Positional]
    """Run folder."""
    bundle: Annotated[str | None, IN_STORES] = None
    """The run's bundle, if it has moved."""
    compute: OmitArgPrefixes[ComputeOptions] = field(default_factory=ComputeOptions)
    """Devices and memory; by default those of the run."""
    multihost: OmitArgPrefixes[MultihostFlags] = ALONE


def main(args: list[str] | None = None, prog: str = "framepack decode") -> None:
    """Parse flags and decode; user errors end with one line and exit code 1."""
    flags = parse(Decode, args, prog)
    # JAX is imported after the flags are parsed, so that --help is quick.
    from framepack_jax.cli.session import session
    from framepack_jax.jobs import sampling

    with session(flags, flags.compute, flags.multihost):
        sampling.decode(flags.folder, flags.compute, bundle_name=flags.bundle)
