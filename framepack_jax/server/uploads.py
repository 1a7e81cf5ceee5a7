"""Uploaded files of a request: where they are saved, and what they are."""

import re
from pathlib import Path

from framepack_jax.server.errors import ApiError
from framepack_jax.server.job import END, KEY_FRAME, UPLOAD

NAMES = (UPLOAD, END, KEY_FRAME)
# Field with the seconds of the key frames.
KEY_TIMES = "key_frame_seconds"
MAX_FILES = 18
# Formats, by their first bytes. Pillow runs other programs for some other formats, and
# libav opens other files that a playlist names.
IMAGES = {
    "PNG": rb"\x89PNG\r\n\x1a\n.*",
    "JPEG": rb"\xff\xd8\xff.*",
    "WebP": rb"RIFF....WEBP.*",
}
VIDEOS = {"mp4": rb"....ftyp.*", "WebM": rb"\x1a\x45\xdf\xa3.*"}
SECONDS = re.compile(r"\d{1,6}(\.\d{1,20})?")


def new_file(folder: Path, name: str) -> Path:
    """Return where an upload is saved. Raises ApiError if there may be none of that name."""
    if name == KEY_FRAME:
        return folder / key_frame_file(len(list(folder.glob(f"{KEY_FRAME}_*"))))
    if name not in (UPLOAD, END):
        expected = f"only {UPLOAD}, {END} and {KEY_FRAME} may be files"
        raise ApiError(400, f"{name!r} is a file; {expected}", name)
    if (folder / name).exists():
        raise ApiError(400, f"{name!r} is given twice", name)
    return folder / name


def key_frame_file(number: int) -> str:
    """Return the name of an uploaded key frame."""
    return f"{KEY_FRAME}_{number}"


def files_of(folder: Path) -> dict[str, str]:
    """Return the uploads in a folder by the option that each is. Raises ApiError."""
    files: dict[str, str] = {}
    if (folder / UPLOAD).exists():
        kind = _format(folder / UPLOAD, UPLOAD, IMAGES | VIDEOS)
        files["extend" if kind in VIDEOS else "image"] = UPLOAD
    if (folder / END).exists():
        _format(folder / END, END, IMAGES)
        files["end_image"] = END
    return files


def key_frames(folder: Path, times: str | None) -> list[tuple[str, float]]:
    """Return the names of key frames with their times in seconds. Raises ApiError."""
    names = [key_frame_file(i) for i in range(len(list(folder.glob(f"{KEY_FRAME}_*"))))]
    for name in names:
        _format(folder / name, KEY_FRAME, IMAGES)
    parts = [] if times is None else times.split(",")
    if len(parts) != len(names) or not all(SECONDS.fullmatch(part.strip()) for part in parts):
        raise ApiError(
            400,
            f"{KEY_TIMES} {times!r}: expected the seconds of {len(names)} files {KEY_FRAME},"
            " divided by commas",
            KEY_TIMES,
        )
    return [(name, float(part)) for name, part in zip(names, parts, strict=True)]


def _format(path: Path, name: str, formats: dict[str, bytes]) -> str:
    """Return the format that a file begins as; decode nothing. Raises ApiError for any other."""
    with open(path, "rb") as file:
        head = file.read(16)
    for kind, begin in formats.items():
        if re.fullmatch(begin, head, re.DOTALL):
            return kind
    raise ApiError(400, f"{name} is no {', '.join(formats)} file", name, "invalid_image")
