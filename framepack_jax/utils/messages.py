"""Short texts for error messages."""

from collections.abc import Iterable

# Names that an error message lists; the others are counted.
MAX_LISTED = 4
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class if it has no text."""
    return str(error).partition("\n")[0] or type(error).__name__


def bytes_text(number: float) -> str:
    """Return a number of bytes with three digits or so: "1.23 GB", "120 MB"."""
    name = next((name for name, unit in UNITS.items() if number >= unit), "kB")
    value = number / UNITS[name]
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"


def shorten(names: Iterable[str], limit: int = MAX_LISTED, separator: str = ", ") -> str:
    """Join the first `limit` names, and say how many more there are."""
    listed = list(names)
    more = [f"and {len(listed) - limit} more"] if len(listed) > limit else []
    return separator.join([*listed[:limit], *more])
