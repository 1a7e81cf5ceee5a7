"""Limits of the server: what a request may ask for. Imports no JAX."""

import dataclasses
import ipaddress
import math


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of requests. Larger requests are refused, not reduced."""

    max_seconds: float = 60.0
    """Longest video in seconds."""
    max_pixels: int | None = None
    """Largest width x height of a video; default: that of the bundle's largest bucket. Weights are
    offloaded for this size."""
    max_steps: int = 100
    """Most denoising steps of a section."""
    max_upload_mb: float = 32.0
    """Largest request with its image, in millions of bytes."""
    max_queue: int = 100
    """Most videos that are queued or in progress."""

    def check(self) -> None:
        """Raise ValueError if a limit would refuse every request."""
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected more than 0")

    @property
    def upload_bytes(self) -> int:
        """Largest body of a request in bytes."""
        return int(self.max_upload_mb * 1e6)


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
