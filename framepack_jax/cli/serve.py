"""`framepack serve`: sample videos for clients of an HTTP API."""

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes

from framepack_jax.cli.common import ALONE
from framepack_jax.jobs.spec import ComputeOptions, ModelOptions
from framepack_jax.server.limits import Limits, check_token
from framepack_jax.utils.flags import parse

if TYPE_CHECKING:
    from framepack_jax.server.model import ServedModel
    from framepack_jax.server.queue import JobQueue

TOKEN = "FRAMEPACK_TOKEN"
# Seconds that open connections have when the server ends.
CLOSING_SECONDS = 2
MAX_CONNECTIONS = 256


@dataclasses.dataclass(frozen=True)
class Serve:
    """Sample videos for clients of an HTTP API: one loaded bundle and a queue.

    The API is that of OpenAI's videos: POST /v1/videos, GET /v1/videos/ID and /content, DELETE,
    list. Each video is a run folder under --output. A server that is started again with the same
    --output continues its queue.
    """

    output: Path | None = None
    """Folder of the videos; one server at a time uses it."""
    host: str = "127.0.0.1"
    """Address to serve on. Addresses that other machines can reach need a token."""
    port: int = 8000
    """Port; 0 takes a free one."""
    token: str | None = None
    """Token that clients send as Authorization: Bearer TOKEN. Other users of the machine can read
    flags: set the environment variable FRAMEPACK_TOKEN instead."""
    web: bool = False
    """Show a page for browsers, too. Needs the extra [web]."""
    batch: int = 1
    """Number of waiting videos of equal size, length and settings that are sampled side by side, if
    so many wait. Takes more memory."""
    limits: OmitArgPrefixes[Limits] = field(default_factory=Limits)
    model: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    compute: OmitArgPrefixes[ComputeOptions] = field(default_factory=ComputeOptions)


def main(args: list[str] | None = None, prog: str = "framepack serve") -> None:
    """Parse flags and serve; user errors end with one line and exit code 1."""
    flags = parse(Serve, args, prog)
    # JAX is imported after the flags are parsed, so that --help is quick.
    from framepack_jax.cli.session import session

    with session(flags, flags.compute, ALONE):
        run(flags)


def run(flags: Serve) -> None:
    """Serve until SIGINT or SIGTERM. Raises ValueError, OSError by name."""
    from framepack_jax.utils import extras

    extras.require("serve", extras.SERVE, "framepack serve")
    if flags.web:
        extras.require("web", extras.WEB, "framepack serve --web")
    from framepack_jax.server.model import load_model
    from framepack_jax.server.queue import JobQueue, locked

    if flags.output is None:
        raise ValueError("--output is missing: give a folder for the videos")
    token = flags.token if flags.token is not None else os.environ.get(TOKEN)
    check_token(flags.host, token)
    flags.limits.check()
    if flags.batch < 1:
        raise ValueError(f"--batch {flags.batch}: expected 1 or more")
    flags.model.bundle_name()
    # All that can be refused without weights comes first.
    with locked(flags.output), bound_socket(flags.host, flags.port) as listener:
        queue = JobQueue(flags.output.absolute(), flags.limits.max_queue)
        check_model(queue, Path(flags.model.bundle_name()).name)
        model = load_model(flags.model, flags.compute, flags.limits.area, flags.batch)
        _serve(flags, model, queue, listener, token)


def _serve(
    flags: Serve,
    model: "ServedModel",
    queue: "JobQueue",
    listener: socket.socket,
    token: str | None,
) -> None:
    import uvicorn

    from framepack_jax.server.api import create_app
    from framepack_jax.server.worker import Worker

    app = create_app(model, queue, Worker(model, queue), flags.limits, token)
    if flags.web:
        from framepack_jax.server.page import add_page
        from framepack_jax.server.page_actions import Actions

        app = add_page(app, Actions(model, queue, flags.limits))
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"{model.name} at http://{address}/v1; {len(queue.waiting())} videos wait", flush=True)
    if flags.web:
        print(f"page at http://{address}/", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False,
        limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=CLOSING_SECONDS,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])


def check_model(queue: "JobQueue", name: str) -> None:
    """Raise ValueError if unfinished jobs of the queue were made for another bundle."""
    if others := {job.model for job in queue.waiting()} - {name}:
        raise ValueError(
            f"output folder {queue.folder} has unfinished videos of bundle"
            f" {', '.join(sorted(others))}; serve that bundle, or choose another --output"
        )


@contextlib.contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket on an address. Raises OSError if it is in use, or not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host.strip("[]"), port))
        except (OSError, OverflowError) as error:
            raise OSError(f"--host {host} --port {port} cannot be served ({error})") from error
        yield listener
