"""Limits of the server: what a request may ask for. Imports no JAX."""

import dataclasses
import ipaddress
import math
import re


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of requests. Larger requests are refused, not reduced."""

    max_seconds: float = 60.0
    """Longest video in seconds, and longest video to continue."""
    sizes: tuple[str, ...] = ()
    """Sizes that requests may ask for, as 640x608; the first is that of requests without a size.
    Default: every size of up to --max-pixels. A new size takes as long as a compilation."""
    max_pixels: int | None = None
    """Largest width x height of a video; default: that of the largest of --sizes, or of the
    largest bucket of the bundle. Weights are offloaded for this size."""
    max_steps: int = 100
    """Most denoising steps of a section."""
    max_upload_mb: float = 32.0
    """Largest request with its image, in millions of bytes."""
    max_queue: int = 100
    """Most videos that are queued or in progress."""

    def check(self) -> None:
        """Raise ValueError if a limit would refuse every request."""
        for name, value in vars(self).items():
            if name != "sizes" and value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected more than 0")
        for size in self.sizes:
            try:
                width, height = parse_size(size)
            except ValueError as error:
                raise ValueError(f"--sizes {error}") from error
            if self.max_pixels is not None and width * height > self.max_pixels:
                raise ValueError(f"--sizes {size} has more than --max-pixels {self.max_pixels}")

    @property
    def area(self) -> int | None:
        """Largest width x height of a video, None for that of the bundle's largest bucket."""
        return self.max_pixels or max((math.prod(parse_size(s)) for s in self.sizes), default=None)

    @property
    def upload_bytes(self) -> int:
        """Largest body of a request in bytes."""
        return int(self.max_upload_mb * 1e6)


def parse_size(text: str) -> tuple[int, int]:
    """Return width and height of WIDTHxHEIGHT. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise ValueError(f"{text[:40]!r}: expected WIDTHxHEIGHT, as 640x608")
    return int(match[1]), int(match[2])


def is_loopback(host: str) -> bool:
    """Return True if only programs of this machine can reach a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_token(host: str, token: str | None) -> None:
    """Raise ValueError if a token is missing for a host that others can reach, or is no token."""
    if token is None:
        if not is_loopback(host):
            raise ValueError(
                f"--host {host} can be reached from other machines, which needs a token: give"
                " --token or FRAMEPACK_TOKEN, or serve on 127.0.0.1"
            )
    elif not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token is empty or has characters other than printable ASCII")
