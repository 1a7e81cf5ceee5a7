"""Read and check captions: text files in UTF-8 or UTF-16, and text from manifests."""

import codecs
import os
import re
from pathlib import Path

from framepack_jax.data.rejected import Rejected

# Suffixes of the caption file beside a video, in order of search.
SUFFIXES = (".txt", ".TXT", ".caption")
MAX_BYTES = 1 << 20
NOT_TEXT = re.compile("[\0\ud800-\udfff]")
# UTF-32 first: its little-endian mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def caption_beside(video: Path) -> str | None:
    """Return the caption in the text file beside a video, stripped; None if there is no file.
    Raises Rejected if it cannot be read."""
    # Unlike Path.is_file, this takes names that are too long.
    file = next((f for s in SUFFIXES if os.path.isfile(f := video.with_suffix(s))), None)
    if file is None:
        return None
    try:
        with open(file, "rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise Rejected("bad_caption", f"{file.name} cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise Rejected("bad_caption", f"{file.name} is larger than 1 MiB, too large for a caption")
    return decode(data, file.name).strip()


def decode(data: bytes, name: str) -> str:
    """Decode text by its byte order mark; without one as UTF-8, or as UTF-16 if it can only be
    that. Raises Rejected with the first wrong byte and its offset."""
    mark, encoding = next(
        (item for item in BYTE_ORDER_MARKS.items() if data.startswith(item[0])),
        (b"", _encoding_without_mark(data)),
    )
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = len(mark) + error.start
        raise Rejected(
            "bad_caption",
            f"{name} is not {encoding.upper()}: byte 0x{data[at]:02x} at offset {at}; save it as"
            " UTF-8",
        ) from error
    if "\0" in text:
        at = len(mark) + len(text[: text.index("\0")].encode(encoding))
        raise Rejected(
            "bad_caption", f"{name} has a NUL, byte 0x00 at offset {at}; save it as UTF-8 text"
        )
    return text


def _encoding_without_mark(data: bytes) -> str:
    """UTF-16 of mostly Latin text has a NUL in every second byte; text in UTF-8 has no NUL."""
    first, second = data[::2], data[1::2]
    for high, low, encoding in ((first, second, "utf-16-be"), (second, first, "utf-16-le")):
        if len(low) == len(high) >= 2 and 0 not in low and 2 * high.count(0) >= len(high):
            text = data.decode(encoding, "replace")
            if all(c.isprintable() or c.isspace() for c in text):
                return encoding
    return "utf-8"


def check(text: str, what: str) -> str:
    """Return the text. Raises Rejected if it has a NUL or a lone surrogate, which is also how bytes
    that are not UTF-8 are read."""
    if bad := NOT_TEXT.search(text):
        raise Rejected(
            "bad_caption",
            f"{what} has {escaped(bad[0])} at character {bad.start()}, which is not text; write it"
            " in UTF-8",
        )
    return text


def escaped(text: str) -> str:
    r"""Return text that can be written anywhere, with \xNN for bytes that are not UTF-8 and \uNNNN
    for NUL and lone surrogates."""
    return NOT_TEXT.sub(lambda bad: _escape(ord(bad[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code < 0xDD00 else f"\\u{code:04x}"
