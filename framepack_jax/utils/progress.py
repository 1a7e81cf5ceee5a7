"""Progress bars on a terminal, and plain lines in a log."""

import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:

    class Base(tqdm):
        """Stand-in, for type checkers, of the tqdm class that `Plain` is mixed into."""

        disable: bool
else:
    Base = object
# Seconds between the lines of a bar in a log.
BETWEEN_LINES = 30
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Plain(Base):
    """Mixin for tqdm classes: if stderr is no terminal, the bar prints a line every half minute and
    one at its end, without carriage returns and control codes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.is_plain = not (sys.stderr is not None and sys.stderr.isatty())
        self.next_line = time.monotonic() + BETWEEN_LINES
        options = {"bar_format": LINE} if self.is_plain else {}
        super().__init__(*args, **options | kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self.is_plain:
            return super().display(msg, pos)
        if time.monotonic() >= self.next_line:
            self._write_line()
        return True

    def clear(self, nolock: bool = False) -> None:
        if not self.is_plain:
            super().clear(nolock)

    def close(self) -> None:
        if not getattr(self, "is_plain", False):
            return super().close()
        if not self.disable:
            self.disable = True
            self._decr_instances(self)
            if self.leave is not False:
                self._write_line()

    def _write_line(self) -> None:
        self.next_line = time.monotonic() + BETWEEN_LINES
        self.fp.write(f"{self}\n")
        self.fp.flush()


class Bar(Plain, tqdm):
    """A tqdm bar on a terminal, plain lines in a log."""


def byte_bar(name: str, size: int) -> Bar:
    """Return a bar of bytes."""
    return Bar(total=size, desc=name, unit="B", unit_scale=True)
