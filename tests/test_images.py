"""Still images in and out: golden crops, every kind of image file, files that are none."""

import time
import zlib

import numpy as np
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
    message = rf"long.png is {size[0]} x {size[1]} pixels .* at most 32 times the shorter.*crop it"
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
    with pytest.raises(ValueError, match=r"bomb.png cannot be read .*900000000.*178956970"):
        video.load_image(tmp_path / "bomb.png")
    assert time.monotonic() - began < 1


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
