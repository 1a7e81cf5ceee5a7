"""Stop a run cleanly when it is told to."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from framepack_jax.parallel import multihost


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a callable that returns True once SIGINT or SIGTERM was received, by this process or by
    any other of the run. Call it once a step, on all hosts."""
    received, several = threading.Event(), jax.process_count() > 1

    def handle(*_: Any) -> None:
        # JAX tells all processes of a SIGTERM that one of them received.
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        received.set()

    before = {}
    if threading.current_thread() is threading.main_thread():
        caught = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, handle) for number in caught}

    def stopping() -> bool:
        return multihost.stopping() if several else received.is_set()

    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
