"""Requests for videos: prompts, images, and videos to continue."""

import collections
import dataclasses
import os
from collections.abc import Iterable, Mapping

import numpy as np

from framepack_jax.generation.geometry import Geometry
from framepack_jax.video import count_frames, read_frames, read_span, resize_center_crop


@dataclasses.dataclass(frozen=True, eq=False)
class SourceVideo:
    """Video to continue.

    Args:
        frames: Number of frames, 1 more than a multiple of the VAE's time compression.
        first: First frame (height, width, 3) uint8.
        last: Last frames (P, height, width, 3) uint8: `Geometry.source_frames`, or all if fewer.
            With `latents`, only the frames of cross-fades are needed.
        latents: Normalised latents (H, W, C) by position, if they are known.
    """

    frames: int
    first: np.ndarray
    last: np.ndarray
    latents: Mapping[int, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Content of one video. Images are (height, width, 3) uint8 of any size.

    `prompt` may change with time, "0s: she waves 4s: she bows". The video begins with `image`, or
    with `source_video`; with neither, from black, led by text alone. `key_frames` are (seconds,
    image). Times count from the start image, or from the last frame of the source video.

    `end_image_as` says what `end_image` is. "guide": one latent frame that follows the video, which
    the first generated section reads and which is not a part of the video; only an order that reads
    ahead can use it. "still": the last `time_compression` frames of the video. "auto": a guide
    if the order reads ahead, else a still.
    """

    prompt: str
    image: np.ndarray | None = None
    negative_prompt: str = ""
    seed: int = 0
    end_image: np.ndarray | None = None
    key_frames: tuple[tuple[float, np.ndarray], ...] = ()
    source_video: SourceVideo | None = None
    end_image_as: str = "auto"


def source_from_frames(
    geometry: Geometry,
    frames: Iterable[np.ndarray],
    height: int | None = None,
    width: int | None = None,
    latents: Mapping[int, np.ndarray] | None = None,
) -> SourceVideo:
    """Return the source video of frames (H, W, 3) uint8, scaled to the size of `Geometry.sizes`.

    Keeps and scales only the frames that are needed. Up to three frames at the end, which fill no
    latent, are dropped. For a file, `read_source` decodes less.

    Raises ValueError if there are no frames.
    """
    first, count, kept = None, 0, geometry.source_frames + geometry.time_compression
    last: collections.deque[np.ndarray] = collections.deque(maxlen=kept)
    for frame in frames:
        if first is None:
            first, (size, _) = frame, geometry.sizes(check_image("frame", frame), height, width)
        last.append(frame)
        count += 1
    if first is None:
        raise ValueError("the video to extend has no frames")
    used, needed_frames = geometry.source_used(count)
    spare = count - used
    needed = list(last)[: len(last) - spare][len(last) - spare - needed_frames :]
    first, *needed = (resize_center_crop(frame, *size) for frame in (first, *needed))
    return SourceVideo(count - spare, first, np.stack(needed), latents)


def read_source(
    geometry: Geometry,
    path: str | os.PathLike,
    fps: float,
    height: int | None = None,
    width: int | None = None,
    latents: Mapping[int, np.ndarray] | None = None,
) -> SourceVideo:
    """Return the source video of a file resampled to `fps` frames per second; decode only its first
    frame and its end.

    Raises ValueError if the file is no video that can be decoded.
    """
    count = count_frames(path, fps)
    frames, needed = geometry.source_used(count)
    first = next(read_frames(path, fps))
    size, _ = geometry.sizes(first.shape[:2], height, width)
    last = read_span(path, fps, frames - needed, needed, size)
    return SourceVideo(frames, resize_center_crop(first, *size), last, latents)


def check_seed(seed: int) -> None:
    """Raise ValueError unless the seed is a number of 64 bits."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed = {seed}: expected 0 to {2**64 - 1}; for sample.py, -1 draws one")


def check_image(name: str, image: np.ndarray) -> tuple[int, int]:
    """Return (height, width) of an image. Raises ValueError unless it is one."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"{name} of shape {image.shape} and type {image.dtype}: expected (height, width, 3)"
            " uint8; video.load_image reads any image file as such"
        )
    return image.shape[:2]
