"""Parse command-line flags, expand ~, check that texts are UTF-8, and where paths lie."""

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro
from etils import epath

from framepack_jax.utils.paths import Stores, check_place

T = TypeVar("T")
# Flags that hold text; every other value that begins with ~ is a path.
TEXTS = ("prompt", "negative_prompt", "caption", "prompt_template")
# Flags that hold addresses of other kinds.
ADDRESSES = ("ray", "coordinator_address")
# A path in the home folder, as also in --key-frame 3.5s=~/photo.png.
AT_TIME = re.compile(r"[0-9.]+s=")
IN_HOME = re.compile(r"(?P<time>[^=/~]*=)?(?P<path>~.*)", re.DOTALL)


def parse(kind: type[T], args: list[str] | None, prog: str, default: T | None = None) -> T:
    """Read the flags of a command, over `default` if given; exit with one line and code 1 if a
    flag is not UTF-8 text."""
    try:
        if default is None:
            flags = tyro.cli(kind, prog=prog, args=args)
        else:
            flags = tyro.cli(kind, prog=prog, args=args, default=default)
    except BrokenPipeError:  # the reader of --help has seen enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    try:
        return tidied("", flags)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def tidied(name: str, value: Any, stores: Stores | None = None) -> Any:
    """Expand ~ in the value of a flag, or in all values of a dataclass or a tuple.

    Raises ValueError for bytes that are no UTF-8 text, which Python reads as lone surrogates, and
    for paths in object stores that are not in `stores`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        groups, marks = _groups(type(value)), _stores(type(value))
        new = {
            n: tidied(name if n in groups else f"{name}.{n}".lstrip("."), v, marks.get(n))
            for n, v in old.items()
        }
        changed = {n: v for n, v in new.items() if v != old[n]}
        return dataclasses.replace(value, **changed) if changed else value
    if type(value) is tuple:
        return tuple(tidied(name, item, stores) for item in value)
    if not isinstance(value, str | os.PathLike):
        return value
    text = str(value)
    flag, last = f"--{name.replace('_', '-')}", name.rpartition(".")[2]
    check_text(flag, text)
    if last in TEXTS:
        return value
    if last not in ADDRESSES:
        check_place(flag, AT_TIME.sub("", text), stores)
    home = IN_HOME.fullmatch(text)
    if home is None:
        return value
    expanded = (home["time"] or "") + os.path.expanduser(home["path"])
    if isinstance(value, str):
        return expanded
    return epath.Path(expanded) if isinstance(value, epath.Path) else Path(expanded)


def _stores(kind: type) -> dict[str, Stores]:
    """Return the object stores that fields may name, by field."""
    hints = get_type_hints(kind, include_extras=True)
    marks = {
        name: [m for m in get_args(h)[1:] if isinstance(m, Stores)] for name, h in hints.items()
    }
    return {name: found[0] for name, found in marks.items() if found}


def _groups(kind: type) -> set[str]:
    """Return the fields whose own fields are flags without a prefix."""
    hints = get_type_hints(kind, include_extras=True)
    omitted = get_args(tyro.conf.OmitArgPrefixes[int])[1]
    return {name for name, hint in hints.items() if omitted in get_args(hint)[1:]}


def check_text(name: str, text: str) -> None:
    """Raise ValueError unless the text can be written as UTF-8 and has no NUL."""
    if "\0" in text:
        raise ValueError(f"{name} {text!r}: it has a NUL; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} {text!r}: expected text in UTF-8; set the terminal to UTF-8, or convert the"
            " source of the text"
        ) from error
