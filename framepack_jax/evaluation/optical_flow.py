"""Dense optical flow between frames, and warping along it.

The flow is OpenCV's "Fast Optical Flow using Dense Inverse Search" (arXiv 1603.03590).

Shapes: H W rows and columns. Frames are (H, W, 3) uint8; flow is (H, W, 2), x and y in pixels.
"""

import math

import cv2
import numpy as np

FINE = 128
"""Minimum length of the shorter side in pixels; larger pictures are read at a coarser scale."""


class Flow:
    """The flow from one frame to another: first(p) is second(p + flow(first, second)(p))."""

    def __init__(self) -> None:
        self._method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        scale = max(0, int(math.log2(min(first.shape[:2]) / FINE)))
        self._method.setFinestScale(scale)
        return self._method.calc(grey(first), grey(second), None)  # type: ignore[call-overload]  # stub: no None


def grey(frame: np.ndarray) -> np.ndarray:
    """Convert a frame to luma (H, W) uint8."""
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)


def warped(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Return the picture whose pixel p is that of the frame at p + flow(p), float32, with edges
    repeated."""
    rows, columns = np.mgrid[: frame.shape[0], : frame.shape[1]].astype(np.float32)
    return cv2.remap(
        frame.astype(np.float32), columns + flow[..., 0], rows + flow[..., 1],
        cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip
