"""Metrics of every frame of a video that need no ground truth: sharpness, colours, motion.

Shapes: P frames, H W rows and columns. Frames are (P, H, W, 3) uint8; values are (P,) float32, nan
if a frame has none (the first and the last frame have one neighbour only).
"""

import dataclasses
import math
from collections.abc import Iterable

import cv2
import numpy as np

from framepack_jax.evaluation.optical_flow import Flow, grey, warped

# The difference of two Laplacians: blind to planes and edges of constant slope.
NOISE_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)


@dataclasses.dataclass(frozen=True)
class Metric:
    """Name and meaning of a metric. `better` is 1 if more is better, -1 if less is better, 0 if the
    value of the ground truth is best: noise adds gradients too, and blur removes noise."""

    title: str
    unit: str
    better: int
    digits: int = 3


METRICS = {
    "sharpness": Metric("Sharpness", "levels a pixel", 0, 2),
    "noise": Metric("Noise", "levels", 0, 2),
    "brightness": Metric("Brightness", "0 to 1", 0),
    "contrast": Metric("Contrast", "0 to 1", 0),
    "saturation": Metric("Saturation", "0 to 1", 0),
    "smoothness": Metric("Smoothness", "0 to 1", 1, 4),
    "dynamics": Metric("Dynamic degree", "heights a second", 0),
}
"""Metrics of `measure`, in the order of tables. Smoothness, which is highest for a still picture,
stands beside dynamic degree, which is 0 for it."""


def measure(frames: Iterable[np.ndarray], fps: float) -> dict[str, np.ndarray]:
    """Measure all `METRICS` of every frame of a video. At most three frames are in memory."""
    flow = Flow()
    figures: dict[str, list[float]] = {name: [] for name in METRICS}
    before: list[np.ndarray] = []
    for frame in frames:
        for name, value in still(frame).items():
            figures[name].append(value)
        dynamics = math.nan
        if before:
            dynamics = dynamic_degree(flow(before[-1], frame), fps)
        figures["dynamics"].append(dynamics)
        if len(before) == 2:
            figures["smoothness"].append(smoothness(flow, before[0], before[1], frame))
        before = [*before[-1:], frame]
    # Smoothness of frame i is measured when frame i + 1 arrives.
    ends = [math.nan] * min(2, len(figures["noise"]))
    figures["smoothness"] = [*ends[:1], *figures["smoothness"], *ends[1:]]
    return {name: np.asarray(values, np.float32) for name, values in figures.items()}


def still(frame: np.ndarray) -> dict[str, float]:
    """Measure the metrics of a frame (H, W, 3) uint8 that need no neighbours."""
    luma = grey(frame).astype(np.float32)
    channels = frame.astype(np.float32)
    highest, lowest = channels.max(axis=-1), channels.min(axis=-1)
    return {
        "sharpness": sharpness(luma),
        "noise": noise(luma),
        "brightness": float(luma.mean()) / 255,
        "contrast": float(luma.std()) / 255,
        "saturation": float(((highest - lowest) / np.maximum(highest, 1)).mean()),
    }


def sharpness(luma: np.ndarray) -> float:
    """Root mean square of the gradient of (H, W) by central differences, in levels a pixel."""
    across = (luma[1:-1, 2:] - luma[1:-1, :-2]) / 2
    down = (luma[2:, 1:-1] - luma[:-2, 1:-1]) / 2
    return float(np.sqrt((across**2 + down**2).mean()))


def noise(luma: np.ndarray) -> float:
    """Standard deviation of white noise in (H, W), after Immerkaer, "Fast Noise Variance
    Estimation" (1996). Fine texture counts as noise."""
    found = cv2.filter2D(luma, cv2.CV_32F, NOISE_KERNEL)[1:-1, 1:-1]
    return float(math.sqrt(math.pi / 2) * np.abs(found).mean() / 6)


def dynamic_degree(flow: np.ndarray, fps: float) -> float:
    """Mean length of the flow (H, W, 2) from frame to frame, in picture heights a second."""
    return float(np.hypot(flow[..., 0], flow[..., 1]).mean() * fps / flow.shape[0])


def smoothness(flow: Flow, before: np.ndarray, frame: np.ndarray, after: np.ndarray) -> float:
    """Return 1 - |frame - mean of its neighbours, each warped by half of the flow between them|,
    averaged over pixels, in units of 255. Steady motion gives 1; flicker and jumps give less."""
    forth, back = flow(before, after), flow(after, before)
    middle = (warped(before, back / 2) + warped(after, forth / 2)) / 2
    return 1 - float(np.abs(middle - frame.astype(np.float32)).mean()) / 255


def psnr(made: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in dB; inf where they are equal."""
    error = np.square(made.astype(np.float32) - truth.astype(np.float32)).mean()
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))
