"""Shared code of the commands: one-line errors with exit codes, JAX settings, flag groups.

This module imports no JAX at the top, so that `--help` is quick.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from framepack_jax.utils.paths import explain_store_error, is_remote, is_store_error

# Exit codes: an error that may pass, one that comes again with the same flags, and the end by
# SIGINT or SIGTERM.
FAILED, HOPELESS = 1, 2
INTERRUPTED, TERMINATED = 130, 143
FAILURES: tuple[type[Exception], ...] = (ValueError, OSError)
DOCTOR = "framepack doctor says what is wrong"
RESUME = "interrupted; run the same command again to resume"


class CommandError(SystemExit):
    """The end of a command with one line, which is its text, and an exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        # Python prints a code that is a text, and ends with exit code 1.
        self.code = text if code == FAILED else code


@contextlib.contextmanager
def cli_errors(
    failures: tuple[type[Exception], ...] = FAILURES,
    *,
    explain: Callable[[Exception], object] = str,
    code: Callable[[Exception], int] = lambda _: FAILED,
    interrupted: str | None = None,
    duration: bool = False,
) -> Iterator[None]:
    """Run a command: end with one line on an error of the user or the machine. Output goes on
    without a reader if the terminal is closed.

    Args:
        failures: Errors that are reported as one line; others are bugs and keep their traceback.
        explain: Gives the line for an error.
        code: Gives the exit code for an error.
        interrupted: The line for Ctrl-C and SIGTERM, which end with exit code 130 and 143.
        duration: Print how long the command took.
    """
    began = time.monotonic()
    show_log()
    try:
        with _lasting_output():
            yield
    except failures as error:
        ended = CommandError(f"error: {explain(error)}", code(error))
        if ended.code == code(error):
            print(ended, file=sys.stderr)
        raise ended from error
    except Exception as error:
        if is_store_error(error):
            raise CommandError(f"error: {explain_store_error(error)}", FAILED) from error
        if is_device_error(error):
            raise CommandError(f"error: JAX cannot start: {error}; {DOCTOR}", FAILED) from error
        raise
    except KeyboardInterrupt as interrupt:
        from framepack_jax.parallel.multihost import Terminated

        if interrupted is not None:
            print(interrupted, file=sys.stderr)
        raise SystemExit(TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED) from None
    if duration:
        print(f"{time.monotonic() - began:.1f} s in all")


def is_device_error(error: Exception) -> bool:
    """Return whether JAX found no device: a plug-in, a driver or JAX_PLATFORMS is wrong."""
    where = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return bool(where) and where[-1].endswith(os.path.join("jax", "_src", "xla_bridge.py"))


class _Lasting:
    """A stream whose text is dropped once nobody can read it: the terminal is closed, or the
    program behind a pipe has ended."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropped():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropped():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropped(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # Libraries in C++ write to the same file.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _lasting_output() -> Iterator[None]:
    """Let a command outlive the readers of stdout and stderr."""
    out, err = (cast(TextIO, _Lasting(stream)) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


class _Terminal(logging.Handler):
    """Print log messages as they are: information to stdout, warnings and errors to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        file = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        print(self.format(record), file=file)


def show_log() -> None:
    """Print the log messages of the package."""
    logger = logging.getLogger("framepack_jax")
    logger.setLevel(logging.INFO)
    # A handler that a library gives to the root logger would print every line again.
    logger.propagate = False
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        logger.addHandler(_Terminal())


@dataclasses.dataclass(frozen=True)
class MultihostFlags:
    """Run the same command on several hosts."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0, with --num-processes and --process-id; or auto, which detects all
    three under SLURM, Open MPI, Kubernetes and on TPU pods."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0."""
    heartbeat_seconds: int = 100
    """Seconds after which the others end if a process is lost."""
    startup_seconds: int = 300
    """Seconds that a process waits for the others to start."""

    def join(self) -> bool:
        """Join the other processes; return False if the flags name none. Raises ValueError."""
        if self.coordinator_address is None:
            if self.num_processes is not None or self.process_id is not None:
                raise ValueError(
                    "--num-processes and --process-id need --coordinator-address, HOST:PORT of"
                    " process 0"
                )
            return False
        for name in ("heartbeat_seconds", "startup_seconds"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)}: expected 1 or more")
        from framepack_jax.parallel import multihost

        multihost.join(
            self.coordinator_address, self.num_processes, self.process_id,
            heartbeat=self.heartbeat_seconds, startup=self.startup_seconds,
        )  # fmt: skip
        if multihost.is_primary():
            print(multihost.summary())
        return True


# Default of the flag: a single process.
ALONE = MultihostFlags()


def parse_size(flag: str, text: str, multiple: int = 1) -> tuple[int, int]:
    """Parse HEIGHTxWIDTH in pixels. Raises ValueError if a side is not a multiple of `multiple`."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not min(size) or any(side % multiple for side in size):
        multiples = f", multiples of {multiple}" if multiple > 1 else ""
        raise ValueError(f"{flag} {text}: expected HEIGHTxWIDTH in pixels{multiples}, as 608x640")
    return size


def configure_jax(compiled: str | None = None, training: bool = False) -> None:
    """Set up JAX for a command that computes: compilation cache in the folder `compiled`, flags of
    the compiler, no warnings of libtpu."""
    from framepack_jax.parallel import hardware, xla_flags

    hardware.quiet_libtpu()
    xla_flags.apply(training)
    enable_compilation_cache(compiled)


def configure_jax_for_dry_run() -> None:
    """Set up JAX to compile for another machine: no cache, and no device of this machine in use."""
    import jax

    # A program for a machine that is not present can be written to the cache, but not read.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")


def enable_compilation_cache(compiled: str | None = None) -> None:
    """Keep compiled programs in a folder or bucket, by default in the user's cache folder; warn if
    it cannot be written.

    JAX's own settings win: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.
    """
    import jax

    settings = jax.config.values
    if settings["jax_enable_compilation_cache"] and settings["jax_compilation_cache_dir"] is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        folder = compiled or root / "framepack-jax" / "compiled"
        if is_remote(folder) or _can_write(Path(folder)):
            jax.config.update("jax_compilation_cache_dir", str(folder))
        else:
            print(
                f"compiled programs are not kept for the next run: {folder} cannot be written;"
                " JAX_COMPILATION_CACHE_DIR names another folder",
                file=sys.stderr,
            )


def _can_write(folder: Path) -> bool:
    """Make a folder; return False if that fails, or if no home folder replaces its ~."""
    with contextlib.suppress(OSError):
        if folder.is_absolute():
            folder.mkdir(parents=True, exist_ok=True)
            return os.access(folder, os.W_OK)
    return False
