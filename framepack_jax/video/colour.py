"""Convert colours of files to sRGB: matrices, primaries, transfer functions, tone mapping.

Codes of matrices, primaries and transfer functions are those of ITU-T H.273. Light is linear; 1 is
diffuse white, the maximum of sRGB, and HDR exceeds it. Diffuse white has 203 cd/m2 in HDR (ITU-R
BT.2408). Brighter light is compressed by the curve of ITU-R BT.2390, annex 5, up to the peak of the
video: the maximum level in its metadata, else 1000 cd/m2.

Shapes: H W rows and columns; colours are (..., 3), red, green and blue.
"""

import functools
import os
import tempfile
from typing import NamedTuple

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.reformatter import Colorspace, Interpolation

from framepack_jax.video.mp4 import UnsupportedVideo

UNSPECIFIED = 2
# Matrices that libswscale supports; 0 is RGB.
MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)
# Untagged videos with at least this many rows use the BT.709 matrix, smaller ones BT.601.
HD_ROWS = 720
LINEAR, SRGB, PQ, HLG = 8, 13, 16, 18
# Display gamma of SDR video (ITU-R BT.1886). It is shown on sRGB screens without conversion of the
# transfer function; only its primaries are converted.
VIDEO, VIDEO_GAMMA = (1, 6, 14, 15), 2.4
BT709, BT2020 = 1, 9
D65 = 0.3127, 0.3290
PRIMARIES = {
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), D65),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),  # DCI-P3
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),  # Display P3
}
"""Chromaticities (x, y) of red, green, blue and white by code. Other codes of videos are close to
BT.709."""
WHITE_NITS, NOMINAL_PEAK = 203.0, 1000.0
"""Luminance in cd/m2 of diffuse white in HDR, and the default peak."""
GRID = 65
"""Points along each axis of the 3D lookup table for HDR videos."""


class Encoding(NamedTuple):
    """Colour encoding of a file.

    `primaries` are chromaticities as in PRIMARIES. `transfer` is a code; `gamma`, if given, is an
    exponent that replaces it. `peak` is the maximum luminance of PQ in cd/m2.
    """

    primaries: tuple[tuple[float, float], ...]
    transfer: int = SRGB
    gamma: float | None = None
    peak: float = NOMINAL_PEAK

    @classmethod
    def of_codes(
        cls, primaries: int, transfer: int, peak: float = NOMINAL_PEAK
    ) -> "Encoding | None":
        """Return the encoding of codes of H.273; None if screens show it without conversion.

        HDR without primaries is BT.2020. Primaries missing in PRIMARIES are taken as BT.709's.
        """
        if transfer in (PQ, HLG):
            return cls(PRIMARIES.get(primaries, PRIMARIES[BT2020]), transfer, peak=peak)
        if primaries not in PRIMARIES:
            primaries = BT709
        if primaries == BT709 and transfer != LINEAR:
            return None
        return cls(PRIMARIES[primaries], transfer)


def to_srgb(colours: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Convert encoded colours (..., 3) from 0 to 1 to sRGB, float32 from 0 to 1.

    Light above diffuse white is tone-mapped; colours outside the gamut are clipped.
    """
    light = _linear(np.asarray(colours, np.float32), encoding) @ to_bt709(encoding.primaries).T
    if encoding.transfer == PQ:
        light = _tone_mapped(light, encoding.peak)
    elif encoding.transfer == HLG:
        light = _tone_mapped(light, NOMINAL_PEAK)
    light = np.clip(light, 0, 1)
    if encoding.transfer in VIDEO:
        return light ** (1 / VIDEO_GAMMA)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


class ColourConverter:
    """Convert decoded frames of one video to RGB.

    `first` is its first frame, whose metadata give the peak luminance.
    """

    def __init__(self, first: av.VideoFrame) -> None:
        self._peak = _peak(first)
        self._tables: dict[tuple[Encoding, int, int], Graph] = {}

    def __call__(self, frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
        """Convert a frame to (height, width, 3) uint8 sRGB. Transparent pixels become white.

        Raises UnsupportedVideo if the frame's colour format is not supported.
        """
        check_colours(frame)
        transfer = VIDEO[0] if frame.color_trc == UNSPECIFIED else frame.color_trc
        encoding = Encoding.of_codes(frame.color_primaries, transfer, self._peak)
        if encoding is not None:
            frame = self._by_table(_scaled(frame, height, width, "gbrp16le"), encoding)
        if any(component.is_alpha for component in frame.format.components):
            picture = _scaled(frame, height, width, "rgba").to_ndarray().astype(np.uint16)
            alpha = picture[:, :, 3:]
            return ((picture[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return _scaled(frame, height, width, "rgb24").to_ndarray()

    def _by_table(self, frame: av.VideoFrame, encoding: Encoding) -> av.VideoFrame:
        key = encoding, frame.height, frame.width
        if key not in self._tables:
            self._tables[key] = _table_filter(frame, encoding)
        graph = self._tables[key]
        graph.push(frame)
        return graph.vpull()


def check_colours(frame: av.VideoFrame) -> None:
    """Raise UnsupportedVideo for colour formats that would be converted wrongly."""
    kinds = {data.type for data in frame.side_data}  # type: ignore[attr-defined]  # stub: Mapping
    dolby = kinds & {Type.DOVI_METADATA, Type.DOVI_RPU_BUFFER}
    if dolby and frame.color_trc == UNSPECIFIED:
        kind = "Dolby Vision without a compatible base layer (profile 5)"
    elif frame.colorspace not in MATRICES:
        kind = f"in a form other than RGB or YCbCr (matrix {frame.colorspace} of ITU-T H.273)"
    else:
        return
    raise UnsupportedVideo(
        f"its colours are {kind}, which cannot be tone-mapped to BT.709; convert it with a video"
        " editor first"
    )


def _scaled(frame: av.VideoFrame, height: int, width: int, form: str) -> av.VideoFrame:
    """Scale a frame and convert it to RGB of pixel format `form` by its tagged matrix and range."""
    matrix = None
    if frame.colorspace == UNSPECIFIED and not frame.format.is_rgb:
        matrix = Colorspace.ITU709 if frame.height >= HD_ROWS else Colorspace.ITU601
    return frame.reformat(
        width, height, form, src_colorspace=matrix, interpolation=Interpolation.BICUBIC
    )


def _peak(frame: av.VideoFrame) -> float:
    """Return the peak luminance in cd/m2 from a frame's metadata, or the default."""
    level = frame.side_data.get(Type.CONTENT_LIGHT_LEVEL)  # type: ignore[call-overload]  # stub: str
    brightest = 0 if level is None else int(np.frombuffer(level, np.uint32)[0])
    return float(np.clip(brightest, WHITE_NITS, 10_000)) if brightest else NOMINAL_PEAK


def _table_filter(frame: av.VideoFrame, encoding: Encoding) -> Graph:
    """Build a libavfilter graph that applies the 3D lookup table to frames like this one."""
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "table.cube")
        with open(path, "w") as file:
            file.write(_cube(encoding))
        table = graph.add("lut3d", file=path)
    graph.link_nodes(source, table, graph.add("buffersink")).configure()
    return graph


@functools.lru_cache(maxsize=4)
def _cube(encoding: Encoding) -> str:
    """Format the conversion of an encoding to sRGB as a .cube file, red changing fastest."""
    axis = np.linspace(0, 1, GRID, dtype=np.float32)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")
    rows = to_srgb(np.stack([red, green, blue], -1), encoding).reshape(-1, 3)
    return f"LUT_3D_SIZE {GRID}\n" + "\n".join(map("%.6f %.6f %.6f".__mod__, map(tuple, rows)))


def _linear(signal: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Convert a signal from 0 to 1 to linear light. Unknown transfer functions count as sRGB."""
    if encoding.gamma is not None:
        return signal**encoding.gamma
    if encoding.transfer == PQ:
        return _pq_nits(signal) / WHITE_NITS
    if encoding.transfer == HLG:
        return _hlg_nits(signal) / WHITE_NITS
    if encoding.transfer == LINEAR:
        return signal
    if encoding.transfer in VIDEO:
        return signal**VIDEO_GAMMA
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


# SMPTE ST 2084.
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def _pq_nits(signal: np.ndarray) -> np.ndarray:
    power = signal ** (1 / _M2)
    return 10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def _pq_signal(nits: np.ndarray) -> np.ndarray:
    power = (np.maximum(nits, 0) / 10_000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def _hlg_nits(signal: np.ndarray) -> np.ndarray:
    """Display light of HLG for a peak of 1000 cd/m2, with system gamma 1.2 (ITU-R BT.2100)."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593], np.float32)
    return NOMINAL_PEAK * scene * luminance[..., None] ** 0.2


def _tone_mapped(light: np.ndarray, peak: float) -> np.ndarray:
    """Tone-map light by its largest component, which keeps hues (ITU-R BT.2390-11, 5.4.1)."""
    top = float(_pq_signal(np.asarray(peak, np.float32)))
    target = float(_pq_signal(np.asarray(WHITE_NITS, np.float32))) / top
    if target >= 1:
        return light
    largest = np.maximum(light.max(-1, keepdims=True), 1e-6)
    level = np.minimum(_pq_signal(largest * WHITE_NITS) / top, 1)
    knee = 1.5 * target - 0.5
    t = np.clip((level - knee) / (1 - knee), 0, 1)
    curve = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (3 * t**2 - 2 * t**3) * target
    )
    mapped = _pq_nits(np.where(level < knee, level, curve) * top) / WHITE_NITS
    return light * (mapped / largest)


def to_bt709(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Return the matrix (3, 3) float32 from linear light of `primaries` to that of BT.709.

    Raises ValueError if the chromaticities span no triangle.
    """
    if any(y <= 0 for _, y in primaries) or abs(np.linalg.det(_corners(primaries))) < 1e-9:
        raise ValueError(f"chromaticities {primaries} span no triangle")
    to_xyz, to_709 = (_to_xyz(p) for p in (primaries, PRIMARIES[BT709]))
    return (np.linalg.inv(to_709) @ to_xyz).astype(np.float32)


def _to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Return the matrix from linear RGB to CIE XYZ under D65, with Bradford adaptation."""
    white, columns = _xyz(primaries[-1]), _corners(primaries)
    matrix = columns * np.linalg.solve(columns, white)
    bradford = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    ratio = (bradford @ _xyz(D65)) / (bradford @ white)
    return np.linalg.inv(bradford) @ (ratio[:, None] * bradford) @ matrix


def _corners(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Return XYZ of red, green and blue as columns, each with luminance 1."""
    return np.stack([_xyz(corner) for corner in primaries[:3]], axis=1)


def _xyz(chromaticity: tuple[float, float]) -> np.ndarray:
    x, y = chromaticity
    return np.array([x / y, 1, (1 - x - y) / y])
