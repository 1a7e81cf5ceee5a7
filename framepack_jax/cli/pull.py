"""`framepack pull`: download what `framepack push-to-hub` has uploaded."""

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from framepack_jax.cli.common import cli_errors
from framepack_jax.utils.flags import parse


@dataclasses.dataclass(frozen=True)
class Pull:
    """Download a bundle, a LoRA or an exported network from the Hugging Face hub.

    Hashes are verified, and the folder appears when it is whole. HF_TOKEN is the access token,
    HF_ENDPOINT another hub. Run the same command again after an interruption.
    """

    repo: Annotated[str, Positional]
    """OWNER/NAME of the repository."""
    output: Path | None = None
    """The new folder; default: one in HF_HOME, where --bundle OWNER/NAME is looked for."""
    revision: str | None = None
    """A branch, tag or commit; default: main."""


def main(args: list[str] | None = None, prog: str = "framepack pull") -> None:
    """Parse flags and download; user errors end with one line and exit code 1."""
    flags = parse(Pull, args, prog)
    from framepack_jax.parallel import hardware
    from framepack_jax.publishing.pull import pull

    hardware.quiet_libtpu()
    with cli_errors():
        print(pull(flags.repo, flags.output, revision=flags.revision))
