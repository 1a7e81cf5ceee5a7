"""`framepack resume`: continue an interrupted run."""

import dataclasses
from dataclasses import field
from typing import Annotated, Literal

from etils import epath
from tyro.conf import OmitArgPrefixes, Positional

from framepack_jax.cli.common import ALONE, MultihostFlags
from framepack_jax.jobs.spec import ComputeOptions
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import FILES_IN_STORES, IN_STORES


@dataclasses.dataclass(frozen=True)
class Resume:
    """Continue a run after its last finished section.

    All options of the video come from the run. The result is bit-identical to that of an
    uninterrupted run with the same type, devices and kernels.
    """

    folder: Annotated[epath.Path, FILES_IN_STORES, Positional]
    """Run folder."""
    bundle: Annotated[str | None, IN_STORES] = None
    """The run's bundle, if it has moved."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and computation; default: that of the run."""
    latents_only: bool = False
    """Save latents without decoding them; `framepack decode` does so later."""
    compute: OmitArgPrefixes[ComputeOptions] = field(default_factory=ComputeOptions)
    """Devices and memory; by default those of the run."""
    multihost: OmitArgPrefixes[MultihostFlags] = ALONE


def main(args: list[str] | None = None, prog: str = "framepack resume") -> None:
    """Parse flags and resume; user errors end with one line and exit code 1."""
    flags = parse(Resume, args, prog)
    # JAX is imported after the flags are parsed, so that --help is quick.
    from framepack_jax.cli.session import session
    from framepack_jax.jobs import sampling

    with session(flags, flags.compute, flags.multihost):
        sampling.resume(
            flags.folder,
            flags.compute,
            bundle_name=flags.bundle,
            dtype=flags.dtype,
            latents_only=flags.latents_only,
        )
