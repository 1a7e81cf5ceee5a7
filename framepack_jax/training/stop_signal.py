"""Stop a run cleanly when it is told to: by Ctrl-C, by a scheduler, by a closed terminal.

While steps have results that no checkpoint holds, a signal ends the run after the step or within a
validation. At any other time (loading, compiling, export) the process leaves within seconds.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax

from framepack_jax.parallel import multihost
from framepack_jax.parallel.multihost import Terminated

# Seconds that the process takes at most to leave when it has nothing to save.
LEAVE_SECONDS = 10
INTERRUPTED = "interrupted; saved steps are kept; run the same command again to resume"


class Stopped(Exception):
    """A signal has come in the midst of a validation."""


class StopSignal(contextlib.AbstractContextManager["StopSignal"]):
    """Signals of this process; in a run of several processes, also SIGTERM to any of them.

    SIGINT, SIGTERM and SIGHUP count; SIGHUP does not if it is ignored, as under nohup. `seconds`
    limits the time from a signal to the end of the process; 0: no limit. Signals are handled if the
    context is entered in the main thread.
    """

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.several = jax.process_count() > 1
        # The first signal of this process, and whether all processes have agreed to stop.
        self.received: int | None = None
        self.agreed = False
        self.requested = False
        self._unsaved = False
        self._exits = contextlib.ExitStack()

    @property
    def exit_code(self) -> int:
        """Exit code of a stopped run: 130 after Ctrl-C, else 143."""
        return 128 + (signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM)

    def called(self) -> bool:
        """Return True once a signal has come. All hosts call it equally often, and all get the same
        answer, some calls after the signal."""
        if self.several:
            self.agreed = self.agreed or multihost.stopping()
            return self.agreed
        return self.requested or self.received is not None

    def request(self) -> None:
        """Let `called` return True in all processes, as after a signal."""
        if not self.requested:
            self.requested = True
            if self.several:
                os.kill(os.getpid(), signal.SIGTERM)

    def check(self) -> None:
        """Raise Stopped once a signal has come. Counts as a call of `called`."""
        if self.called():
            raise Stopped

    @contextlib.contextmanager
    def unsaved(self) -> Iterator[None]:
        """Let signals wait for `called` while this context lasts."""
        self._unsaved = True
        try:
            yield
        finally:
            self._unsaved = False

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, *([] if self.several else [signal.SIGTERM])]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._exits.callback(signal.signal, number, signal.signal(number, self._handle))
            if self.several:
                self._watch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exits.close()

    def _handle(self, number: int, _: Any) -> None:
        if self.several:
            self.received = self.received or number
            # JAX tells all processes of a SIGTERM that one of them has received.
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._note(number)
        if not self._unsaved:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def _watch(self) -> None:
        """Notice SIGTERM beside the handler of JAX, which is not Python's."""
        reader, writer = os.pipe()
        # It writes a traceback to the pipe, then calls the handler that was there before.
        faulthandler.register(signal.SIGTERM, file=writer, all_threads=False, chain=True)
        self._exits.callback(os.close, writer)
        self._exits.callback(faulthandler.unregister, signal.SIGTERM)

        def wait() -> None:
            with os.fdopen(reader, "rb", buffering=0) as pipe:
                if pipe.read(1) and not self.requested:
                    self._note(signal.SIGTERM)
                    if not self._unsaved:
                        self._leave()

        threading.Thread(target=wait, daemon=True).start()

    def _note(self, number: int) -> None:
        """Record the first signal, and start the clock."""
        self.received = self.received or number
        seconds = self.seconds if self._unsaved else LEAVE_SECONDS
        if seconds:
            timer = threading.Timer(seconds, self._leave)
            timer.daemon = True
            timer.start()
            self._exits.callback(timer.cancel)

    def _leave(self) -> None:
        """End the process, whatever its other threads do."""
        with contextlib.suppress(OSError, ValueError):
            print(INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(self.exit_code)
