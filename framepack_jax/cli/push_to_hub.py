"""`framepack push-to-hub`: upload a bundle, a LoRA or an exported network."""

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from framepack_jax.cli.common import cli_errors
from framepack_jax.utils.flags import parse


@dataclasses.dataclass(frozen=True)
class PushToHub:
    """Upload a bundle, a LoRA or an exported network to the Hugging Face hub, with a model card.

    The content of the path tells what it is. HF_TOKEN is the access token, HF_ENDPOINT another hub.
    Run the same command again after an interruption.
    """

    path: Annotated[str, Positional]
    """A bundle, a LoRA file, a folder of LoRA files as RUN/bundle, or a folder of framepack export.
    """
    repo: str
    """OWNER/NAME of the repository, which is made if there is none."""
    private: bool = False
    """Make a private repository."""
    revision: str | None = None
    """The branch to upload to, which is made if there is none; default: main."""


def main(args: list[str] | None = None, prog: str = "framepack push-to-hub") -> None:
    """Parse flags and upload; user errors end with one line and exit code 1."""
    flags = parse(PushToHub, args, prog)
    from framepack_jax import bundle
    from framepack_jax.parallel import hardware
    from framepack_jax.publishing.push import push

    hardware.quiet_libtpu()
    with cli_errors():
        path = Path(bundle.resolve(flags.path))
        print(push(path, flags.repo, private=flags.private, revision=flags.revision))
