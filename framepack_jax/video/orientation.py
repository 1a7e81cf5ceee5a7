"""Size and orientation at which a player shows a stored picture."""

from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.stream import VideoStream


class Orientation(NamedTuple):
    """Transpose and mirror operations that turn a stored picture as a player shows it."""

    transpose: bool = False
    mirror_rows: bool = False
    mirror_columns: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "Orientation":
        """Read the display matrix: a pixel (x, y) is shown at (a x + c y, b x + d y)."""
        matrix = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]  # stub: str only
        if matrix is None:
            return cls()
        a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, b < 0, c < 0)
        return cls(False, d < 0, a < 0)

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Turn a picture (H, W, 3)."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        rows, columns = (-1 if mirror else 1 for mirror in self[1:])
        return picture[::rows, ::columns]


def shown_size(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Return the (height, width) in pixels at which a player shows a frame."""
    height, width = square_size(frame, stream)
    return (width, height) if Orientation.of(frame).transpose else (height, width)


def square_size(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Return the (height, width) of a stored picture in square pixels, without downscaling."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if aspect >= 1:
        return frame.height, round(frame.width * aspect)
    return round(frame.height / aspect), frame.width
