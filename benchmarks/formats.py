"""Read one scene from files of many kinds, and compare it with the truth and with another decoder.

    python -m benchmarks.formats outputs/formats          # needs the program ffmpeg

The scene has a chart of twelve colours, a bar that moves steadily, and a clock: its time in frames,
as digits and as a row of squares that are white for ones. Each file shows it through another
format; the product reads it back at 30 frames a second, and so does the program ffmpeg, with its
own filters for HDR. The table has, for each, the largest error of a colour in levels, of the bar's
place in pixels of the picture as shown, and of the clock in frames of the file. The files and a
sheet of one frame of each are left in the folder.
"""

import argparse
import io
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont

from framepack_jax import video

HEIGHT, WIDTH, SECONDS = 288, 512, 4
COLOURS = np.array(
    [
        (200, 30, 40), (30, 180, 60), (30, 50, 200), (128, 128, 128), (235, 235, 235), (60,) * 3,
        (220, 180, 150), (20,) * 3, (230, 200, 40), (20, 180, 200), (180, 40, 180), (90, 110, 70),
    ]
)  # fmt: skip
BITS = 10
# Pixels a second of the bar, and its width.
SPEED, BAR = 100, 12


def scene(time: float, number: int) -> np.ndarray:
    """The scene (H, W, 3) uint8 at a time in seconds, frame `number` of its file."""
    picture = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    cells = COLOURS.reshape(2, 6, 3).astype(np.uint8)
    picture[: HEIGHT // 2, : 6 * (WIDTH // 6)] = cells.repeat(HEIGHT // 4, 0).repeat(WIDTH // 6, 1)
    lane = picture[HEIGHT // 2 : HEIGHT * 3 // 4]
    lane[:] = 20
    at = round(SPEED * time)
    lane[:, at : at + BAR] = 235
    image = Image.fromarray(picture)
    font = ImageFont.load_default(HEIGHT // 6)
    ImageDraw.Draw(image).text((10, HEIGHT * 3 // 4), f"{number:03d}", fill="white", font=font)
    picture = np.array(image)
    side = WIDTH // (2 * BITS)
    for bit in range(BITS):
        left = WIDTH // 2 + bit * side
        level = 235 if number >> bit & 1 else 20
        picture[HEIGHT * 7 // 8 : HEIGHT * 7 // 8 + side, left : left + side] = level
    return picture


class Reading(NamedTuple):
    """Reading of a frame: colours (12, 3), the bar's left edge as a share of the width, the number
    of the clock."""

    colours: np.ndarray
    bar: float
    number: int


def read(picture: np.ndarray) -> Reading:
    """Read the scene of a picture of any size."""
    height, width = picture.shape[:2]
    rows = [int(height * (1 + 2 * row) / 8) for row in range(2)]
    columns = [int(width * (1 + 2 * column) / 12.05) for column in range(6)]
    colours = np.stack([
        picture[y - 3 : y + 4, x - 3 : x + 4].astype(float).mean(axis=(0, 1))
        for y in rows for x in columns
    ])  # fmt: skip
    lane = picture[int(height * 0.58) : int(height * 0.67)].astype(float).mean(axis=(0, 2))
    bar = float(np.flatnonzero(lane > 128)[0] / width) if (lane > 128).any() else np.nan
    side = width / (2 * BITS)
    y = int(height * 7 / 8 + side * height / width * 16 / 18)
    squares = [int(width / 2 + (bit + 0.5) * side) for bit in range(BITS)]
    lit = [picture[y - 2 : y + 3, x - 2 : x + 3].mean() > 128 for x in squares]
    return Reading(colours, bar, sum(bool(on) << bit for bit, on in enumerate(lit)))


class Kind(NamedTuple):
    """A kind of file: its suffix, its rate, ffmpeg's flags to write it, filters to read it as a
    player shows it, the height and width at which it is shown, whether it has fields or a mirror in
    its display matrix, and the curve of HDR."""

    suffix: str
    rate: float
    flags: str
    shown: str = "null"
    size: tuple[int, int] = (HEIGHT, WIDTH)
    fields: bool = False
    mirrored: bool = False
    curve: Callable[[np.ndarray], np.ndarray] | None = None


def pq(nits: np.ndarray) -> np.ndarray:
    """Light in cd/m2 as a signal from 0 to 1 (SMPTE ST 2084)."""
    y = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(nits: np.ndarray) -> np.ndarray:
    """Light of a screen of 1000 cd/m2 as a signal from 0 to 1 (ITU-R BT.2100)."""
    luminance = np.maximum(nits @ [0.2627, 0.6780, 0.0593], 1e-6)[..., None]
    e = nits / 1000 * (luminance / 1000) ** (1 / 1.2 - 1)
    upper = 0.17883277 * np.log(np.maximum(12 * e - 0.28466892, 1e-9)) + 0.55991073
    return np.where(e <= 1 / 12, np.sqrt(3 * e), upper)


# ITU-R BT.2087: linear light of BT.709 in the primaries of BT.2020.
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def hdr(picture: np.ndarray, curve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """sRGB (H, W, 3) uint8 as uint16 of BT.2020, white paper of 203 cd/m2."""
    level = picture / 255
    light = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    return np.round(65535 * curve(203 * light @ TO_2020.T)).astype(np.uint16)


HEVC = (
    "-vf scale=out_color_matrix=bt2020:out_range=tv -pix_fmt yuv420p10le -c:v libx265 -crf 6"
    " -x265-params log-level=0 -colorspace bt2020nc -color_primaries bt2020 -color_trc "
)
FROM_HDR = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=709,tonemap=mobius:desat=0:peak=4.93,"
    "zscale=t=iec61966-2-1:m=gbr:r=full"
)
BT709 = "-colorspace bt709 -color_primaries bt709 -color_trc bt709"
H264 = "-c:v libx264 -crf 6 -pix_fmt yuv420p"
TO_709 = f"-vf scale=out_color_matrix=bt709 {H264} {BT709}"
INTERLACED = (
    f"-vf scale=out_color_matrix=bt709,tinterlace=interleave_top -flags +ilme+ildct {H264}"
    f" -x264-params tff=1 {BT709}"
)
DVD = "-vf scale=720:576,setsar=64/45 -c:v mpeg2video -q:v 2 -bf 2"
AVI = f"-vf scale=out_color_matrix=bt601 {H264} -bf 3"
GIF = "-vf split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"
WEBM = (
    "-vf scale=out_color_matrix=bt709 -c:v libvpx-vp9 -crf 8 -b:v 0 -cpu-used 8 -pix_fmt yuv420p"
    f" {BT709}"
)
KINDS = {
    "HLG": Kind("mp4", 30, HEVC + "arib-std-b67", FROM_HDR, curve=hlg),
    "PQ": Kind("mp4", 30, HEVC + "smpte2084", FROM_HDR, curve=pq),
    "anamorphic DVD": Kind("vob", 25, DVD, "scale=1024:576,setsar=1", (576, 1024)),
    "mirrored telephone": Kind("mov", 30, TO_709, "hflip", mirrored=True),
    "interlaced broadcast": Kind("ts", 25, INTERLACED, "bwdif=mode=send_frame", fields=True),
    "AVI with B-frames": Kind("avi", 25, AVI),
    "8 fps animation": Kind("mp4", 8, TO_709),
    "GIF, 12.5 fps": Kind("gif", 12.5, GIF),
    "59.94 fps": Kind("mp4", 60000 / 1001, TO_709),
    "WebM, VP9": Kind("webm", 30, WEBM),
}


def write(path: Path, kind: Kind) -> None:
    """Write the scene by the program ffmpeg; of fields, twice as many pictures."""
    rate = kind.rate * (2 if kind.fields else 1)
    count = round(SECONDS * rate)
    with subprocess.Popen(
        ["ffmpeg", "-hide_banner", "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt",
         "rgb48le" if kind.curve else "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", f"{rate}", "-i",
         "-", *kind.flags.split(), str(path)],
        stdin=subprocess.PIPE,
    ) as program:  # fmt: skip
        for k in range(count):
            picture = scene(k / rate, k // 2 if kind.fields else k)
            picture = picture[:, :: -1 if kind.mirrored else 1]
            program.stdin.write((hdr(picture, kind.curve) if kind.curve else picture).tobytes())
        program.stdin.close()
    if program.returncode:
        raise SystemExit(f"ffmpeg cannot write {path}")
    if kind.mirrored:
        _mirror(path)


def _mirror(path: Path) -> None:
    """Set the display matrix of a QuickTime file to a mirror, as front cameras do."""
    data = bytearray(path.read_bytes())
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))
    data[at : at + 4] = struct.pack(">i", -65536)
    path.write_bytes(data)


def by_ffmpeg(path: Path, kind: Kind) -> Iterator[np.ndarray]:
    """The frames at 30 a second by the program ffmpeg."""
    height, width = kind.size
    command = [
        "ffmpeg", "-hide_banner", "-loglevel", "error", "-noautorotate", "-i", str(path), "-vf",
        f"{kind.shown},fps=30:round=up", "-f", "rawvideo", "-pix_fmt", "rgb24", "-",
    ]  # fmt: skip
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    yield from np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


class Errors(NamedTuple):
    """The largest errors of colours in levels, of the bar in pixels, of the clock in frames, and
    how many frames were read."""

    colour: float
    bar: float
    clock: int
    frames: int


def errors(frames: list[np.ndarray], kind: Kind) -> Errors:
    """Compare frames at 30 a second with the scene at their times."""
    colour = bar = clock = 0.0
    for k, picture in enumerate(frames):
        number = min(int((k / 30 + 1e-3) * kind.rate), round(SECONDS * kind.rate) - 1)
        found = read(picture)
        colour = max(colour, np.abs(found.colours - COLOURS).max())
        expected = round(SPEED * number / kind.rate) / WIDTH
        bar = max(bar, abs(found.bar - expected) * picture.shape[1])
        clock = max(clock, abs(found.number - number))
    return Errors(float(colour), float(bar), int(clock), len(frames))


def still_images(folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(kind, as the product reads it, the truth) of the chart in a JPEG of Display P3 and HEIC."""
    truth = scene(0.5, 15)
    icc = display_p3()
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    image = ImageCms.profileToProfile(
        Image.fromarray(truth), ImageCms.createProfile("sRGB"), profile, outputMode="RGB"
    )
    image.save(folder / "p3.jpg", quality=98, subsampling=0, icc_profile=icc)
    yield "JPEG, Display P3", video.load_image(folder / "p3.jpg"), truth
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()
    image.save(folder / "p3.heic", quality=95, icc_profile=icc)
    yield "HEIC, Display P3", video.load_image(folder / "p3.heic"), truth


def display_p3() -> bytes:
    """An ICC profile, version 2, of Display P3's primaries and an exponent of 2.2."""

    def xyz(*numbers: float) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * x) for x in numbers))

    curve = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(256 * 2.2))
    name = b"Display P3"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name + bytes(79 + 2),
        b"wtpt": xyz(0.9642, 1, 0.8249), b"rXYZ": xyz(0.51512, 0.2412, -0.00105),
        b"gXYZ": xyz(0.29198, 0.69225, 0.04189), b"bXYZ": xyz(0.1571, 0.06657, 0.78407),
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    at, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", tag, at + len(data), len(content))
        data += content
    head = struct.pack(">I4xI4s4s4s12x4s28x12s48x", at + len(data), 0x02100000, b"mntr", b"RGB ",
                       b"XYZ ", b"acsp", xyz(0.9642, 1, 0.8249)[8:])  # fmt: skip
    return head + struct.pack(">I", len(tags)) + table + data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    print("| file | colour | bar | clock | frames | ffmpeg: colour | bar | clock | frames |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    pictures, labels = [], []
    for name, found, truth in still_images(folder):
        difference = np.abs(read(found).colours - read(truth).colours).max()
        print(f"| {name} | {difference:.0f} | | | | | | | |")
        pictures.append(found)
        labels.append(name)
    for name, kind in KINDS.items():
        path = folder / f"{name.split(',')[0].replace(' ', '_')}.{kind.suffix}"
        write(path, kind)
        ours = list(video.read_frames(path, 30))
        rows = [errors(ours, kind), errors(list(by_ffmpeg(path, kind)), kind)]
        numbers = [f"{e.colour:.0f} | {e.bar:.1f} | {e.clock} | {e.frames}" for e in rows]
        print(f"| {name} | {' | '.join(numbers)} |", flush=True)
        pictures.append(video.resize_center_crop(ours[len(ours) // 2], HEIGHT, WIDTH))
        labels.append(f"{name}, frame {len(ours) // 2} of {len(ours)}")
    video.save_png(folder / "sheet.png", video.labelled_sheet(pictures, labels, columns=3))


if __name__ == "__main__":
    main()
