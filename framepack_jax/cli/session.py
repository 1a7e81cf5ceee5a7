"""Set up `sample`, `resume` and `decode`: signals, errors, other processes, attention."""

import contextlib
import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from framepack_jax.cli.common import ALONE, MultihostFlags, cli_errors, configure_jax
from framepack_jax.jobs.errors import FAILURES, explained
from framepack_jax.jobs.loading import check_kernel
from framepack_jax.jobs.spec import ComputeOptions
from framepack_jax.ops.attention import use as use_attention
from framepack_jax.parallel.multihost import Terminated, assert_same_on_hosts, is_primary


@contextlib.contextmanager
def session(flags: Any, compute: ComputeOptions, multihost: MultihostFlags) -> Iterator[None]:
    """Run a sampling command; `flags` are all its flags, which must be the same on all hosts."""
    configure_jax()
    with sampling_errors(), use_attention(compute.attention):
        _join(flags, multihost)
        check_kernel(compute.attention, jax.default_backend())
        yield


@contextlib.contextmanager
def sampling_errors() -> Iterator[None]:
    """End with one line on an error, and with the exit code of the signal on SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    with cli_errors((ValueError, FloatingPointError, *FAILURES), explain=explained):
        yield


def _join(flags: Any, multihost: MultihostFlags) -> None:
    """Join the other processes, if flags name them. Raises ValueError."""
    if not multihost.join():
        return
    if jax.process_count() == 1:
        # Joining has replaced the handler.
        signal.signal(signal.SIGTERM, _terminate)
    else:
        # Ctrl-C, like SIGTERM, ends all processes after a step.
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert_same_on_hosts("flags", dataclasses.replace(flags, multihost=ALONE))
    if not is_primary():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _terminate(*_: object) -> None:
    raise Terminated
