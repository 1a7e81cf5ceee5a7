"""Colours of files as those of a screen: matrices, primaries, transfer functions, tone mapping.

Codes of matrices, primaries and transfer functions are those of ITU-T H.273.
"""

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation

UNSPECIFIED = 2
HD_ROWS = 720


class ColourConverter:
    def __call__(self, frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
        matrix = None
        if frame.colorspace == UNSPECIFIED and not frame.format.is_rgb:
            matrix = Colorspace.ITU709 if frame.height >= HD_ROWS else Colorspace.ITU601
        return frame.reformat(
            width, height, "rgb24", src_colorspace=matrix, interpolation=Interpolation.BICUBIC
        ).to_ndarray()
