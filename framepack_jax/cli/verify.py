"""`framepack verify`: compare a checkpoint with a bundle, tensor by tensor."""

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from framepack_jax.cli.common import cli_errors
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import IN_STORES


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare the networks that a checkpoint and a bundle both have, bit for bit.

    The exit code is 1 if any tensor differs.
    """

    source: Annotated[Path, Positional]
    """A checkpoint, a diffusers pipeline folder, or a repository of the Hugging Face hub."""
    bundle: Annotated[str, IN_STORES, Positional]
    """A bundle: a folder, or a bundle of this package by its name."""
    prefix: str | None = None
    """Prefix of the tensors to compare if the checkpoint holds several sets of weights of one
    network."""


def main(args: list[str] | None = None, prog: str = "framepack verify") -> None:
    """Parse flags and compare; differences and user errors end with exit code 1."""
    flags = parse(Verify, args, prog)
    from framepack_jax import bundle
    from framepack_jax.conversion import verify
    from framepack_jax.parallel import hardware

    hardware.quiet_libtpu()
    with cli_errors(duration=True):
        prefix = flags.prefix and f"{flags.prefix.removesuffix('.')}."
        results = verify.compare(flags.source, bundle.resolve(flags.bundle), prefix)
        print(verify.table(results))
    if any(result.differing for result in results):
        raise SystemExit(1)
