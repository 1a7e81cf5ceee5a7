"""Timed prompts: parse them, and compute the share of each at a time."""

import itertools
import re
import unicodedata
import warnings
from collections.abc import Sequence

import numpy as np

# Times in prompts: "4s", "4.5 sec", "4,5s", "0:04", "0:00:04.5".
_NUMBER = r"(?:\d+(?:[.,]\d+)?|\.\d+)"
_SECONDS = rf"{_NUMBER}\s?(?:seconds?|secs?|s|秒)\b"
_CLOCK = r"(?:\d+:)?\d{1,2}:\d\d(?:[.,]\d+)?\b(?!:\d)"
_TIME = rf"(?:{_CLOCK}|{_SECONDS})"
# Not a part of a word, a number or a negative time.
_ALONE = r"(?<![\w-])(?<!\d[.,:])"
_TO = r"\s?[-–—~]\s?"
_SPAN = rf"(?P<begin>{_TIME}|{_NUMBER}(?={_TO}{_TIME}))(?:{_TO}(?P<end>{_TIME}))?"
_CLOSING = {"[": "]", "(": ")", "{": "}", "【": "】"}
_OPEN, _CLOSE = "[\\[({【]", "[\\])}】]"
# A time mark: "4s:" or "[4s:", "[4s]", "4s -".
_TIME_MARKS = [
    re.compile(mark, re.IGNORECASE)
    for mark in (
        rf"(?:(?P<open>{_OPEN})\s*|{_ALONE}){_SPAN}\s?:",
        rf"{_OPEN}\s*{_SPAN}\s*{_CLOSE}\s?:?",
        rf"{_ALONE}{_SPAN}\s[-–—]+>?\s(?!\s*{_TIME})",
    )
]
# Text that may be meant as a time mark but is not parsed as one.
_TIME_IN_TEXT = re.compile(
    rf"{_ALONE}-?{_TIME}\s?(?:[:=]|[-–—]+>?\s)|{_OPEN}\s*{_SPAN}\s*{_CLOSE}|\bat\s{_SECONDS}"
    rf"|{_ALONE}{_NUMBER}\s?(?:ms|m|mins?|minutes?)\s?(?:{_SECONDS})?:"
    r"|(?<![\w:])(?:0?0:)?0?0:\d\d(?![\w:])|^\W*0+(?:[.,]0+)?\s?(?:seconds?|secs?|s)\b",
    re.IGNORECASE,
)


def timed_prompts(text: str) -> list[tuple[float, str]]:
    """Return prompts with the seconds at which they begin.

    "0s: she waves 4.5s: she bows" is [(0.0, "she waves"), (4.5, "she bows")]. A text that does not
    begin with a time is one prompt from 0. Other styles are "[0s: she waves] [4.5s: she bows]",
    "[0s] she waves [4.5s] she bows", "0s-4s: ...", "0 sec: ..." and "0:00: ...".

    Warns of text that looks like a time mark but is not one. Raises ValueError if times do not
    begin at 0 and rise, or if a bracket is not closed.
    """
    marks = _time_marks(_narrow(text))
    prompts, spans = [(0.0, text)], []
    if marks:
        spans = [_span(mark) for mark in marks]
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        prompts = [
            (begin, _text_of(mark, text[mark.end() : end].strip().rstrip(",;|").rstrip()))
            for mark, end, (begin, _) in zip(marks, ends, spans, strict=True)
        ]
    _check_spans(spans)
    for _, part in prompts:
        if found := _TIME_IN_TEXT.search(_narrow(part)):
            warnings.warn(
                f"{part[found.start() : found.end()].strip()!r} in the prompt is taken as text, not"
                ' as a time; write "0s: ... 4s: ..." for prompts by time',
                stacklevel=1,  # one place, so that Python shows it once
            )
    return prompts


def _narrow(text: str) -> str:
    """Return the text with full-width letters, digits and colons as ASCII; positions stay."""
    narrow = (unicodedata.normalize("NFKC", letter) for letter in text)
    return "".join(n if len(n) == 1 else letter for n, letter in zip(narrow, text, strict=True))


def _time_marks(text: str) -> list[re.Match[str]]:
    """Return the time marks of a text that begins with one, all in the style of the first."""
    for style in _TIME_MARKS:
        marks = list(style.finditer(text))
        if marks and not text[: marks[0].start()].strip():
            return marks if _is_meant(style, marks[0]) else []
    return []


def _is_meant(style: re.Pattern[str], first: re.Match[str]) -> bool:
    """Return False for a prompt that begins with a time of day or a duration.

    Examples are "12:30: a street" and "5s - a dog runs". In these styles, timed prompts must begin
    with 0.
    """
    ambiguous = style is _TIME_MARKS[-1] or ":" in first["begin"]
    return not ambiguous or _seconds(first["begin"]) == 0


def _span(mark: re.Match[str]) -> tuple[float, float | None]:
    """Return the seconds at which the prompt of a time mark begins and, if given, ends."""
    begin, end = mark["begin"], mark["end"]
    return _seconds(begin), None if end is None else _seconds(end)


def _seconds(time: str) -> float:
    """Parse "4.5s", "4,5 sec", "4" or "0:04.5" to seconds."""
    parts = re.sub(r"[^\d.,:]", "", time).replace(",", ".").split(":")
    return sum(float(part) * 60**i for i, part in enumerate(reversed(parts)))


def _text_of(mark: re.Match[str], text: str) -> str:
    """Return the text of a time mark without its closing bracket. Raises ValueError."""
    opened = mark.groupdict().get("open")
    if not opened:
        return text
    text = text.rstrip(".")
    if not text.endswith(_CLOSING[opened]):
        raise ValueError(
            f"prompt {mark[0].strip()!r}: expected {_CLOSING[opened]!r} right before the next time"
            f" or the end, but its text is {text!r}; write [0s: ...] [4s: ...]"
        )
    return text[:-1].strip()


def _check_spans(spans: Sequence[tuple[float, float | None]]) -> None:
    """Raise ValueError unless prompts begin at 0 and rise; warn of gaps and overlaps."""
    times = [begin for begin, _ in spans]
    if spans and (times[0] != 0 or any(b <= a for a, b in itertools.pairwise(times))):
        raise ValueError(
            f"prompt times {', '.join(f'{t:g}s' for t in times)}: they must begin with 0s and rise"
        )
    for begin, end in spans:
        if end is not None and end <= begin:
            raise ValueError(f"prompt time {begin:g}s-{end:g}s: it ends before it begins")
    for (begin, end), (following, _) in itertools.pairwise(spans):
        if end is not None and end != following:
            warnings.warn(
                f"the prompt of {begin:g}s-{end:g}s is not followed by one from {end:g}s but from"
                f" {following:g}s: each lasts until the next begins",
                stacklevel=1,
            )


def prompt_shares(times: Sequence[float], at: float, span: float) -> list[float]:
    """Return the share of each prompt at a time in seconds; shares sum to 1.

    Around the beginning of a prompt, it is blended linearly with the one before for `span` seconds;
    0 switches at once.
    """
    shares = [1.0]
    for time in times[1:]:
        risen = float(at >= time if span <= 0 else np.clip((at - time) / span + 0.5, 0, 1))
        shares = [*(share * (1 - risen) for share in shares), risen]
    return shares
