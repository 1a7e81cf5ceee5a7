"""Result of a check."""

import dataclasses
from typing import Literal

Status = Literal["ok", "warning", "problem", "skipped"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of a diagnosis: what was looked at, what was seen, and what to do about it.

    A problem makes commands fail; a warning makes them slower or refuses a part of them.
    """

    subject: str
    status: Status
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.status:8} {self.subject}: {self.text}{remedy}"
