"""`framepack launch -- COMMAND`: run a training command until it finishes, restarting it after
failures."""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated

from framepack_jax.cli.common import HOPELESS, INTERRUPTED, TERMINATED, cli_errors
from framepack_jax.utils import fields
from framepack_jax.utils.fields import Range
from framepack_jax.utils.flags import parse
from framepack_jax.utils.heartbeat import VARIABLE, read_heartbeat

# Longest pause before a restart, in seconds.
MAX_PAUSE = 300
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Run a training command until it finishes: framepack launch [FLAGS] -- train.py --config ...

    After a failure (a lost process, a hang, a full disk) the command is started again and resumes
    from its newest checkpoint. It is not started again if it finishes (exit code 0), if its flags
    are wrong (2), or if it is told to stop (130, 143). Signals to this command are passed on. On
    several hosts, start it on each.
    """

    max_failures: Annotated[int, Range(at_least=1)] = 3
    """Number of failures after which the command is given up, if none came further than the one
    before it."""
    pause_seconds: Annotated[float, Range(at_least=0)] = 10.0
    """Pause before the first restart; it doubles with each failure at the same step, up to five
    minutes."""


class Launcher:
    """Run one command, again and again."""

    def __init__(self, command: list[str], flags: Launch) -> None:
        self.command, self.flags = command, flags
        self.child: subprocess.Popen[bytes] | None = None
        self.told = threading.Event()

    def run(self) -> int:
        """Return the exit code of the last run of the command."""
        failures, farthest = 0, -1
        with tempfile.TemporaryDirectory() as folder:
            beats = Path(folder) / "heartbeat.json"
            while True:
                code = self._run_once(os.environ | {VARIABLE: str(beats)})
                if self.told.is_set() or code in (0, HOPELESS, INTERRUPTED, TERMINATED):
                    return code
                step = read_heartbeat(beats) or 0
                failures = 1 if step > farthest else failures + 1
                farthest = max(step, farthest)
                if failures >= self.flags.max_failures:
                    times = f"{failures} failures without a step after step {farthest}"
                    _say(f"gives up after {times}: the command {_how(code)}")
                    return code
                pause = min(self.flags.pause_seconds * 2 ** (failures - 1), MAX_PAUSE)
                _say(f"the command {_how(code)} at step {step}; it starts again in {pause:g} s")
                if self.told.wait(pause):
                    return code

    def _run_once(self, env: dict[str, str]) -> int:
        """Return the exit code of the command; 128 + n if signal n has ended it."""
        self.child = subprocess.Popen(self.command, env=env)
        code = self.child.wait()
        return code if code >= 0 else 128 - code

    def stop(self, number: int, _: object) -> None:
        """Pass a signal on, and start nothing again."""
        self.told.set()
        # A terminal sends Ctrl-C to the command too.
        if self.child is not None and not (number == signal.SIGINT and sys.stdin.isatty()):
            self.child.send_signal(number)


def _how(code: int) -> str:
    if code - 128 in set(signal.Signals):
        return f"was ended by {signal.Signals(code - 128).name}"
    return f"failed (exit code {code})"


def _say(text: str) -> None:
    print(f"framepack launch: {text}", file=sys.stderr, flush=True)


def main(args: list[str] | None = None, prog: str = "framepack launch") -> None:
    """Parse flags, run the command, and end with its exit code."""
    args = sys.argv[1:] if args is None else args
    at = args.index("--") if "--" in args else len(args)
    flags, command = parse(Launch, args[:at], prog), args[at + 1 :]
    with cli_errors():
        fields.check(flags)
        if not command:
            raise ValueError(f"give a command after --: {prog} -- train.py --config ...")
        launcher = Launcher(_executable(command), flags)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, launcher.stop)
        code = launcher.run()
    raise SystemExit(code)


def _executable(command: list[str]) -> list[str]:
    """Return the command with the interpreter that runs a Python file or this package."""
    if command[0] == "framepack":
        return [sys.executable, "-m", "framepack_jax", *command[1:]]
    return [sys.executable, *command] if command[0].endswith(".py") else command
