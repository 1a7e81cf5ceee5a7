"""Command-line flags: parsed, with the home folder in place of ~, and checked to be text."""

import dataclasses
import os
import re
from typing import Any, TypeVar

import tyro

T = TypeVar("T")
# Flags that hold text. All others that begin with ~ are paths.
TEXTS = ("prompt", "negative_prompt", "caption", "prompt_template")
# A path in the home folder, also of --key-frame 3.5s=~/photo.png.
IN_HOME = re.compile(r"(?P<time>[^=/~]*=)?(?P<path>~.*)", re.DOTALL)


def parse(kind: type[T], args: list[str] | None, prog: str, default: T | None = None) -> T:
    """Read the flags of a command, over `default` if given; leaves with one line and exit code 1
    where one is no UTF-8 text."""
    given = {} if default is None else {"default": default}
    flags = tyro.cli(kind, prog=prog, args=args, **given)
    try:
        return tidied("", flags)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def tidied(name: str, value: Any) -> Any:
    """The value of a flag with ~ expanded; of a dataclass or a tuple, all of its values. Raises
    ValueError for bytes that are no UTF-8 text, which Python reads as lone surrogates."""
    if dataclasses.is_dataclass(value):
        old = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        new = {n: tidied(f"{name}.{n}".lstrip("."), v) for n, v in old.items()}
        changed = {n: v for n, v in new.items() if v != old[n]}
        return dataclasses.replace(value, **changed) if changed else value
    if type(value) is tuple:
        return tuple(tidied(name, item) for item in value)
    if not isinstance(value, str | os.PathLike):
        return value
    text = str(value)
    check_text(f"--{name.replace('_', '-')}", text)
    home = None if name in TEXTS else IN_HOME.fullmatch(text)
    if home is None:
        return value
    return type(value)((home["time"] or "") + os.path.expanduser(home["path"]))


def check_text(name: str, text: str) -> None:
    """Raise ValueError unless the text can be written as UTF-8 and has no NUL."""
    if "\0" in text:
        raise ValueError(f"{name} {text!r}: it has a NUL; take it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} {text!r}: expected text in UTF-8; set the terminal to UTF-8, or convert what"
            " the text comes from"
        ) from error
