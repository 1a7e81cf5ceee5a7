"""Still images in and out: golden crops, every kind of image file, files that are none."""

import functools
import struct
import sys
import time
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from framepack_jax import video

RED = (255, 0, 0)


def gradient(height=48, width=64):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * 3, rows * 4, 0 * rows], -1).astype(np.uint8)


def saved(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return video.load_image(tmp_path / name)


@pytest.mark.golden
def test_resize_and_crop_equal_the_release(golden):
    cases = np.load(golden / "resize_center_crop.npz")
    numbers = {key.split("/")[0] for key in cases}
    assert numbers
    for number in numbers:
        expected = cases[f"{number}/result"]
        ours = video.resize_center_crop(cases[f"{number}/image"], *expected.shape[:2])
        np.testing.assert_array_equal(ours, expected)


def test_an_image_of_the_right_size_is_untouched():
    image = gradient()
    assert video.resize_center_crop(image, 48, 64) is image


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    if mode == "I;16":
        picture = Image.fromarray(np.full((20, 30), 0xFFFF, np.uint16))
    else:
        picture = Image.new("RGB", (30, 20), "white").convert(mode)
    image = saved(tmp_path, picture, "image.tiff" if mode == "PA" else "image.png")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.full((20, 30, 3), 255))


def test_transparent_pixels_become_white(tmp_path):
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 128))
    for suffix, options in ((".png", {}), (".webp", {"lossless": True, "exact": True})):
        loaded = saved(tmp_path, image, "image" + suffix, **options)
        np.testing.assert_array_equal(loaded[0, 0], [255, 255, 255])
        np.testing.assert_allclose(loaded[0, 1], [227, 127, 127], atol=1)
    grey = Image.new("LA", (20, 20), (0, 0))
    grey.putpixel((1, 0), (100, 255))
    np.testing.assert_array_equal(saved(tmp_path, grey)[0, :2], [[255] * 3, [100] * 3])
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    for name in ("image.png", "image.gif"):
        loaded = saved(tmp_path, palette, name, transparency=0)
        np.testing.assert_array_equal(loaded[0, :2], [[255] * 3, [10, 20, 30]])


def test_16_bits_keep_their_upper_byte(tmp_path):
    shades = np.zeros((16, 16), np.uint16)
    shades[0, :4] = [0, 0x40FF, 0x8000, 0xFFFF]
    loaded = saved(tmp_path, Image.fromarray(shades))
    np.testing.assert_array_equal(loaded[0, :4, 0], [0, 0x40, 0x80, 0xFF])
    (tmp_path / "rgb.png").write_bytes(png_of_16_bit_rgb(np.stack([shades, shades.T, shades], -1)))
    loaded = video.load_image(tmp_path / "rgb.png")
    np.testing.assert_array_equal(loaded, np.stack([shades, shades.T, shades], -1) >> 8)


@pytest.mark.parametrize("bits", [12, 32])
def test_grey_of_other_depths_is_scaled(tmp_path, bits):
    """TIFF of microscopes and cameras, with its bits a sample as they are."""
    shades = np.zeros((16, 16), np.uint32)
    shades[0, :4] = np.array([0, 0.25, 0.5, 1]) * (2**bits - 1)
    (tmp_path / "a.tiff").write_bytes(tiff(shades, bits))
    loaded = video.load_image(tmp_path / "a.tiff")
    np.testing.assert_array_equal(loaded[0, :4, 0], [0, 63, 127, 255])


def tiff(pixels, bits):
    """A grey TIFF file (H, W) of 12 or 32 bits a pixel, uncompressed."""
    if bits == 32:
        data = pixels.astype("<u4").tobytes()
    else:
        a, b = pixels.reshape(-1, 2).T
        data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()
    height, width = pixels.shape
    long, short = 4, 3
    tags = (
        (256, long, width), (257, long, height), (258, short, bits), (259, short, 1),
        (262, short, 1), (273, long, 8), (277, short, 1), (278, long, height),
        (279, long, len(data)), (339, short, 1),
    )  # fmt: skip
    entries = b"".join(struct.pack("<HHIHxx" if k == short else "<HHII", t, k, 1, v)
                       for t, k, v in tags)  # fmt: skip
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def png_of_16_bit_rgb(pixels):
    """A PNG file of (H, W, 3) uint16, which Pillow reads but does not write."""
    height, width = pixels.shape[:2]
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = pixels.astype(">u2").reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))


@pytest.mark.parametrize("name", ["c.jpg", "c.tiff"])
def test_cmyk_is_converted(tmp_path, name):
    loaded = saved(tmp_path, Image.new("CMYK", (16, 16), (255, 0, 0, 0)), name, quality=100)
    np.testing.assert_allclose(loaded[4, 4], [0, 255, 255], atol=3)


# Linear light of an sRGB screen, and back.
def light(levels):
    levels = np.asarray(levels) / 255
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def levels(light):
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


COLOURS = np.array([(200, 30, 40), (30, 180, 60), (30, 50, 200), (128, 128, 128)])
# CIE XYZ under D50 of red, green and blue: of Display P3 (Apple's profile), and of sRGB.
P3 = (0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)
BT709 = (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)


def as_written(primaries, gamma):
    """COLOURS in the levels of another screen: primaries (3, XYZ), a plain exponent."""
    linear = light(COLOURS) @ np.array(BT709) @ np.linalg.inv(primaries)
    return 255 * np.clip(linear, 0, 1) ** (1 / gamma)


def swatches(colours, mode="RGB"):
    """A picture of 20 x 20 pixels for each colour."""
    cells = np.asarray(colours).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(cells.repeat(20, 0), (20, *cells.repeat(20, 0).shape)),
                           mode)  # fmt: skip


def seen(loaded):
    return loaded[10, 10::20].astype(int)


def profile(kind, space, tags):
    """An ICC profile, version 2, of a class of device and a space of colours."""
    at, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, at + len(data), len(content))
        data += content
    connection = b"Lab " if kind == b"prtr" else b"XYZ "
    head = struct.pack(
        ">I4sI4s4s4s12x4s24xI12x48x", at + len(data), b"    ", 0x02100000, kind, space, connection,
        b"acsp", 0,
    )  # fmt: skip
    head = (
        head[:68] + struct.pack(">3i", *(round(65536 * x) for x in (0.9642, 1, 0.8249))) + head[80:]
    )
    return head[:128] + struct.pack(">I", len(tags)) + table + data


def text(words):
    return b"desc" + bytes(4) + struct.pack(">I", len(words) + 1) + words + bytes(1 + 4 + 4 + 70)


def xyz(x, y, z):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * v) for v in (x, y, z)))


def exponent(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))


def rgb_profile(primaries, gamma):
    names = b"rXYZ", b"gXYZ", b"bXYZ"
    tags = {name: xyz(*corner) for name, corner in zip(names, primaries, strict=True)}
    tags |= {name: exponent(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return profile(b"mntr", b"RGB ", {b"desc": text(b"x"), b"wtpt": xyz(0.9642, 1, 0.8249), **tags})


@pytest.mark.parametrize(
    "suffix,mode",
    [
        ("png", "RGB"),
        ("png", "RGBA"),
        ("jpg", "RGB"),
        ("tiff", "RGB"),
        ("webp", "RGB"),
        ("png", "P"),
    ],
)
def test_colours_are_those_of_the_icc_profile(tmp_path, suffix, mode):
    """As of iPhones: Display P3."""
    picture = swatches(as_written(P3, 2.2))
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
    options = lossless.get(suffix, {}) | {"icc_profile": rgb_profile(P3, 2.2)}
    picture = picture.quantize(8) if mode == "P" else picture.convert(mode)
    loaded = saved(tmp_path, picture, f"a.{suffix}", **options)
    assert np.abs(seen(loaded) - COLOURS).max() <= 3


def test_transparency_outlives_the_icc_profile(tmp_path):
    picture = swatches(as_written(P3, 2.2)).convert("RGBA")
    picture.putalpha(
        Image.fromarray((np.arange(1600).reshape(20, 80) // 800 * 255).astype(np.uint8))
    )
    loaded = saved(tmp_path, picture, icc_profile=rgb_profile(P3, 2.2))
    np.testing.assert_array_equal(loaded[2], np.full((80, 3), 255))
    assert np.abs(loaded[12, 10::20].astype(int) - COLOURS).max() <= 3


def test_grey_has_profiles_of_its_own(tmp_path):
    tags = {b"desc": text(b"x"), b"wtpt": xyz(0.9642, 1, 0.8249), b"kTRC": exponent(1.0)}
    grey = Image.new("L", (20, 20), 128)
    linear = saved(tmp_path, grey, icc_profile=profile(b"mntr", b"GRAY", tags))
    assert abs(int(linear[5, 5, 0]) - levels(128 / 255)) <= 1
    # Grey with the profile of a screen is as common.
    loaded = saved(tmp_path, grey, icc_profile=rgb_profile(P3, 1.0))
    assert abs(int(loaded[5, 5, 0]) - levels(128 / 255)) <= 1


def test_cmyk_is_converted_by_its_profile(tmp_path):
    """Ink that is grey by its profile: cyan alone has L* = 50, any other ink is black."""
    nodes = np.zeros((2, 2, 2, 2, 3), np.uint8)
    nodes[..., 1:] = 128  # a* = b* = 0
    nodes[0, 0, 0, 0, 0], nodes[1, 0, 0, 0, 0] = 255, round(255 * 0.5)
    identity = np.arange(256, dtype=np.uint8).tobytes()
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table += 4 * identity + nodes.tobytes() + 3 * identity
    tags = {b"desc": text(b"x"), b"wtpt": xyz(0.9642, 1, 0.8249), b"A2B0": table}
    inks = swatches([(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)], "CMYK")
    icc = profile(b"prtr", b"CMYK", tags)
    loaded = saved(tmp_path, inks, "a.tiff", icc_profile=icc)
    # L* = 50 is 18.4 % of white's light.
    expected = np.array([255, levels(0.184), 0])[:, None]
    assert np.abs(seen(loaded) - expected).max() <= 3


@pytest.mark.parametrize("fault", ["damaged", "of other colours"])
def test_a_profile_that_cannot_be_used_warns(tmp_path, fault):
    tags = {b"desc": text(b"x"), b"wtpt": xyz(0.9642, 1, 0.8249), b"kTRC": exponent(1.0)}
    icc = b"no profile" * 20 if fault == "damaged" else profile(b"mntr", b"GRAY", tags)
    with pytest.warns(UserWarning, match=r"image.png: its colour profile is ignored .* as sRGB"):
        loaded = saved(tmp_path, swatches(COLOURS), icc_profile=icc)
    np.testing.assert_array_equal(seen(loaded), COLOURS)


def test_png_says_its_colours_in_chunks(tmp_path):
    """gAMA and cHRM, which sRGB goes before, which cICP goes before."""
    with_chunks = functools.partial(png_with, tmp_path / "a.png")
    linear = swatches(255 * light(COLOURS))
    gamma = (b"gAMA", (100_000).to_bytes(4, "big"))
    assert np.abs(seen(with_chunks(linear, gamma)) - COLOURS).max() <= 8, "8 bits are few"
    assert np.abs(seen(with_chunks(linear, gamma, (b"sRGB", b"\0"))) - linear_of(linear)).max() == 0
    # Display P3: its primaries and white (ITU-T H.273, 12) and the curve of sRGB (13).
    p3 = swatches(levels(light(COLOURS) @ np.array(BT709) @ np.linalg.inv(P3)))
    cicp = (b"cICP", bytes([12, 13, 0, 1]))
    assert np.abs(seen(with_chunks(p3, cicp, gamma)) - COLOURS).max() <= 3
    corners = 0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06
    chromaticities = (b"cHRM", b"".join(round(1e5 * c).to_bytes(4, "big") for c in corners))
    usual = (b"gAMA", (45455).to_bytes(4, "big"))
    assert np.abs(seen(with_chunks(p3, usual, chromaticities)) - COLOURS).max() <= 3
    np.testing.assert_array_equal(seen(with_chunks(p3, usual)), linear_of(p3))


@pytest.mark.parametrize("corners", [[0.0] * 8, [0.3127, 0.329, *[0.64, 0.33] * 2, 0.15, 0.06]])
def test_chromaticities_that_are_no_colours_warn(tmp_path, corners):
    chromaticities = (b"cHRM", b"".join(round(1e5 * c).to_bytes(4, "big") for c in corners))
    gamma = (b"gAMA", (45455).to_bytes(4, "big"))
    with pytest.warns(UserWarning, match=r"a.png: its colour profile is ignored"):
        loaded = png_with(tmp_path / "a.png", swatches(COLOURS), gamma, chromaticities)
    np.testing.assert_array_equal(seen(loaded), COLOURS)


def linear_of(picture):
    return seen(np.asarray(picture))


def png_with(path, picture, *chunks):
    """A picture loaded from a PNG file with chunks before its pixels."""
    picture.save(path)
    data = path.read_bytes()
    extra = png(*chunks)[8:]
    path.write_bytes(data[:33] + extra + data[33:])
    return video.load_image(path)


def test_a_png_of_hdr_is_tone_mapped(tmp_path):
    """White paper of 203 cd/m2 is 58 % of PQ's signal."""
    picture = Image.new("RGB", (20, 20), (round(255 * 0.5807),) * 3)
    loaded = png_with(tmp_path / "a.png", picture, (b"cICP", bytes([9, 16, 0, 1])))
    assert 222 <= loaded[5, 5, 0] <= 236 and np.ptp(loaded[5, 5]) == 0


def test_heic_is_read_by_its_profile(tmp_path):
    pillow_heif.register_heif_opener()
    picture = swatches(as_written(P3, 2.2)).resize((160, 40), Image.Resampling.NEAREST)
    loaded = saved(tmp_path, picture, "a.heic", icc_profile=rgb_profile(P3, 2.2), quality=95)
    assert loaded.shape == (40, 160, 3)
    assert np.abs(loaded[20, 20::40].astype(int) - COLOURS).max() <= 12


def test_heic_without_its_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=r"a.HEIC cannot be read .*pip install pillow-heif"):
        video.load_image(tmp_path / "a.HEIC")


# EXIF orientation -> what has to be done to the stored picture, by the EXIF standard's table.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_honoured(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = saved(tmp_path, Image.fromarray(gradient()), exif=exif)
    np.testing.assert_array_equal(loaded, UPRIGHT[orientation](gradient()))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    first, *others = (Image.new("RGB", (20, 20), c) for c in (RED, (0, 255, 0), (0, 0, 255)))
    options = {"lossless": True} if suffix == "webp" else {}
    loaded = saved(
        tmp_path, first, f"a.{suffix}", save_all=True, append_images=others, duration=100, **options
    )
    np.testing.assert_array_equal(loaded, np.full((20, 20, 3), RED))


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_images_too_small_for_a_video_are_refused(tmp_path, size):
    message = rf"small.png is {size[0]} x {size[1]} pixels .* at least 16 pixels; give a larger"
    with pytest.raises(ValueError, match=message):
        saved(tmp_path, Image.new("RGB", size), "small.png")


@pytest.mark.parametrize("size", [(20000, 20), (20, 20000), (16 * 32 + 1, 16)])
def test_images_too_long_for_a_video_are_refused(tmp_path, size):
    message = (
        rf"long.png is {size[0]} x {size[1]} pixels .* at most 32 times the shorter.*crop the image"
    )
    with pytest.raises(ValueError, match=message):
        saved(tmp_path, Image.new("L", size), "long.png")


@pytest.mark.parametrize("size", [(16, 16), (16 * 32, 16), (16, 16 * 32)])
def test_the_limits_themselves_are_allowed(tmp_path, size):
    assert saved(tmp_path, Image.new("L", size)).shape == (size[1], size[0], 3)


def test_a_decompression_bomb_is_refused_at_once(tmp_path):
    side = (30_000).to_bytes(4, "big")
    header = side + side + bytes([8, 2, 0, 0, 0])
    (tmp_path / "bomb.png").write_bytes(png((b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")))
    began = time.monotonic()
    message = (
        r"bomb.png is 30000 x 30000 pixels .* the maximum is 268 million pixels; scale it down"
    )
    with pytest.raises(ValueError, match=message):
        video.load_image(tmp_path / "bomb.png")
    assert time.monotonic() - began < 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("height", "width", "limit"),
    [
        (1_224, 1_632, 10**6 - 10**4),
        # Of a camera with 200 megapixels: takes 2.5 GB.
        pytest.param(12_240, 16_320, Image.MAX_IMAGE_PIXELS, marks=pytest.mark.slow),
    ],
)
def test_a_photograph_above_twice_the_limit_of_pillow_is_read(
    tmp_path, monkeypatch, height, width, limit
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert height * width > 2 * limit
    (tmp_path / "large.png").write_bytes(png_of_grey(height, width))
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "large.png")
    assert video.load_image(tmp_path / "large.png").shape == (height, width, 3)
    assert limit == Image.MAX_IMAGE_PIXELS, "a limit of the caller's own stays"


def png_of_grey(height, width):
    """A PNG file of one grey, one bit a pixel, quickly."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(height * (1 + width // 8)), 1)
    return png((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))


def png(*chunks):
    """A PNG file of (name, data)."""
    parts = [
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_file_that_is_no_image_is_named(tmp_path):
    for suffix in ("png", "jpg", "webp", "gif"):
        whole = tmp_path / f"whole.{suffix}"
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(whole)
        cut = whole.read_bytes()[: whole.stat().st_size // 2]
        (tmp_path / f"cut.{suffix}").write_bytes(cut)
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.ones((20, 20), np.float32)).save(tmp_path / "float.tiff")
    names = ["cut.png", "cut.jpg", "cut.webp", "cut.gif", "text.png", "empty.png", "folder.png"]
    for name in [*names, "float.tiff", "missing.png"]:
        with pytest.raises(ValueError, match=rf"{name} cannot be read.*give a PNG"):
            video.load_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff"])
def test_damaged_files_give_a_picture_or_a_value_error(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    image, path = Image.fromarray(gradient()), tmp_path / f"whole.{suffix}"
    image.save(path, exif=exif) if suffix != "gif" else image.save(path)
    data, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(100):
        damaged = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, min(len(damaged), 400), 3)
        damaged[places] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            assert video.load_image(path).shape[2] == 3
        except ValueError as error:
            refused += 1
            assert path.name in str(error)
    assert refused


def test_save_png_is_lossless_and_whole(tmp_path):
    image = gradient()
    video.save_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(video.load_image(tmp_path / "a.png"), image)
    with pytest.raises((TypeError, ValueError)):
        video.save_png(tmp_path / "a.png", image[..., :2].astype(np.float32))
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    np.testing.assert_array_equal(video.load_image(tmp_path / "a.png"), image)
