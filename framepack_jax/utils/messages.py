"""Short texts for error messages."""

from collections.abc import Iterable

# Names that an error message lists; the others are counted.
MAX_LISTED = 4


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class if it has no text."""
    return str(error).partition("\n")[0] or type(error).__name__


def shorten(names: Iterable[str], limit: int = MAX_LISTED, separator: str = ", ") -> str:
    """Join the first `limit` names, and say how many more there are."""
    listed = list(names)
    more = [f"and {len(listed) - limit} more"] if len(listed) > limit else []
    return separator.join([*listed[:limit], *more])
