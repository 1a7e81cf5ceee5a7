"""Encoders and decoders of video."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from framepack_jax.doctor.finding import Finding

DECODERS = ("h264", "hevc", "vp9", "av1", "mpeg4", "prores")
SIDE, FRAMES, FPS = 64, 8, 30.0
WRONG = 40
"""Levels that a pixel of a written video may be off on average."""
REMEDY = 'pip install --force-reinstall "av>=17", whose wheels bring their codecs'


def codecs() -> Iterator[Finding]:
    """Look for the codecs, write a small video as sampling does, and read it again."""
    try:
        import av
        from av.codec import codecs_available
    except ImportError as error:
        yield Finding("video", "problem", f"PyAV cannot be imported ({error})", REMEDY)
        return
    if "libx264" not in codecs_available:
        text = f"PyAV {av.__version__} has no encoder for H.264 (libx264)"
        yield Finding("video", "problem", text, REMEDY)
        return
    if missing := [name for name in DECODERS if name not in codecs_available]:
        text = f"PyAV {av.__version__} does not read {', '.join(missing)}"
        yield Finding("video", "warning", text, REMEDY)
    yield written()


def written() -> Finding:
    """Write a video of shades of grey and compare what is read."""
    from framepack_jax import video

    shades = np.linspace(40, 200, FRAMES).astype(np.uint8)
    frames = np.broadcast_to(shades[:, None, None, None], (FRAMES, SIDE, SIDE, 3))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        try:
            video.write_mp4(file, frames, FPS)
            read = video.read_span(file, FPS, 0, FRAMES, (SIDE, SIDE))
        except (OSError, ValueError) as error:
            return Finding("video", "problem", f"no video can be written ({error})", REMEDY)
    off = np.abs(read.astype(float) - frames).mean()
    if off > WRONG:
        return Finding("video", "problem", f"a written video is off by {off:.0f} levels", REMEDY)
    return Finding("video", "ok", "a video is written and read")
