"""Files of a run: arrays and pictures, each written whole or not at all."""

import fnmatch
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from framepack_jax.generation.request import Request
from framepack_jax.utils.files import atomic_write

# All files of a run besides its record; no other file in its folders is ever removed.
FILES = {
    "": ("video.mp4", "video.gif", "preview.png", "*.part"),
    "inputs": ("image.png", "end_image.png", "key_frame_*.png", "footage.npz", "*.part"),
    "latents": ("known.npz", "section_*.npz", "*.part"),
    "segments": ("frames_*.mp4", "*.part"),
    "frames": ("frame_*.png", "*.part"),
}


class DamagedFile(ValueError):
    """A file of latents that cannot be used; `done` are the latents of the sections before it."""

    done: Sequence[np.ndarray] = ()


def write_whole(path: epath.Path, data: bytes) -> None:
    """Write a file atomically. Raises OSError that names it."""
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def save_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file. Raises OSError."""
    buffer = io.BytesIO()
    named: dict[str, Any] = dict(arrays)
    np.savez(buffer, **named)
    write_whole(path, buffer.getvalue())


def load_arrays(path: epath.Path, *names: str) -> dict[str, np.ndarray]:
    """Read arrays of an .npz file. Raises DamagedFile, FileNotFoundError."""
    try:
        with path.open("rb") as data, np.load(data, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own
        raise DamagedFile(f"{path} is damaged ({error})") from error


def would_replace(folder: epath.Path, path: Path) -> bool:
    """Return whether a new run in a folder would remove a file, or the run in a folder."""
    found, own = path.resolve(), Path(os.path.realpath(folder))
    if found == own:
        return True
    parts = found.relative_to(own).parts if found.is_relative_to(own) else ()
    patterns = FILES.get("" if len(parts) == 1 else parts[0], ()) if parts else ()
    return len(parts) <= 2 and any(fnmatch.fnmatch(found.name, pattern) for pattern in patterns)


def pictures(request: Request) -> dict[str, np.ndarray]:
    """Return the images of a prepared request by the names of their files."""
    images = {} if request.image is None else {"image": request.image}
    if request.end_image is not None:
        images["end_image"] = request.end_image
    return images | {key_frame_name(i): image for i, (_, image) in enumerate(request.key_frames)}


def key_frame_name(number: int) -> str:
    return f"key_frame_{number:02d}"


def open_picture(path: epath.Path) -> np.ndarray:
    """Read a picture (H, W, 3) of a run. Raises ValueError if it is damaged."""
    try:
        with path.open("rb") as data, Image.open(data) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); make the video again with --overwrite"
        ) from error
