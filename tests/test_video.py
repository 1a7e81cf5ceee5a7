"""Images and videos in and out: golden crops and blends, round trips, every kind of image file."""

import av
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from PIL import Image
from safetensors.numpy import load_file

from framepack_jax import video

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)


def moving_gradient(frames, height=48, width=64):
    rows, columns = np.mgrid[:height, :width]
    shades = [
        np.stack([columns * 2 + 3 * t, rows * 3, 0 * rows + 5 * t], -1) for t in range(frames)
    ]
    return np.stack(shades).clip(0, 255).astype(np.uint8)


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
    image = moving_gradient(1)[0]
    assert video.resize_center_crop(image, 48, 64) is image


@pytest.mark.golden
def test_preview_equals_the_release(golden):
    tensors = load_file(golden / "pipeline.safetensors")
    ours = video.latent_preview(rearrange(tensors["preview/latents"], "b c t h w -> b t h w c"))
    expected = rearrange(tensors["preview/rgb"], "b c t h w -> b t h w c")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.golden
def test_cross_fade_equals_the_release(golden):
    tensors = load_file(golden / "pipeline.safetensors")
    names = ("blend/history", "blend/current", "blend/overlap5")
    earlier, later, expected = (
        jnp.asarray(rearrange(tensors[name], "b c t h w -> b t h w c")) for name in names
    )
    np.testing.assert_allclose(video.cross_fade(earlier, later, 5), expected, rtol=0, atol=1e-6)


def test_cross_fade_goes_linearly_from_one_to_the_other():
    joined = video.cross_fade(jnp.ones((4, 2)), jnp.zeros((5, 2)), 3, axis=0)
    np.testing.assert_allclose(joined[:, 0], [1, 1, 0.5, 0, 0, 0], atol=1e-7)
    single = video.cross_fade(jnp.ones((1, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16), 1)
    assert single.dtype == jnp.bfloat16
    np.testing.assert_array_equal(single[0], [1, 0])


@pytest.mark.parametrize("overlap", [0, 3])
def test_an_impossible_overlap_is_refused(overlap):
    with pytest.raises(ValueError, match=f"overlap is {overlap} frames; it must be 1 to 2"):
        video.cross_fade(jnp.ones((1, 2)), jnp.ones((1, 9)), overlap)


def test_mp4_round_trip(tmp_path):
    frames, path = moving_gradient(13), tmp_path / "out.mp4"
    video.write_mp4(path, iter(frames), fps=30)
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]
    with av.open(path) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.height, codec.width, stream.frames) == (48, 64, 13)
        assert stream.average_rate == 30 and stream.start_time == 0
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come first"
    back, fps = video.read_mp4(path)
    assert fps == 30 and back.shape == frames.shape and back.dtype == np.uint8
    assert np.abs(back.astype(int) - frames).mean() < 2


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, GREY], ids=str)
def test_colours_survive_and_are_tagged_as_they_are_coded(tmp_path, colour):
    path = tmp_path / "flat.mp4"
    video.write_mp4(path, np.full((3, 32, 32, 3), colour, np.uint8), fps=24)
    back, _ = video.read_mp4(path)
    assert np.abs(back.astype(int) - np.array(colour)[None, None, None]).max() <= 3
    with av.open(path) as container:
        codec = container.streams.video[0].codec_context
        tags = codec.colorspace, codec.color_range, codec.color_primaries, codec.color_trc
        assert tags == (1, 1, 1, 1), "BT.709, limited range"
        luma = next(container.decode(video=0)).to_ndarray()[0, 0]
    r, g, b = np.array(colour) / 255
    assert luma == pytest.approx(16 + 219 * (0.2126 * r + 0.7152 * g + 0.0722 * b), abs=1.5)


def test_a_lower_crf_comes_closer(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), np.uint8).repeat(3, -1)
    errors = []
    for crf in (1, 40):
        video.write_mp4(tmp_path / "n.mp4", noise, 30, crf)
        errors.append(np.abs(video.read_mp4(tmp_path / "n.mp4")[0].astype(int) - noise).mean())
    assert errors[0] < 3 < errors[1]


@pytest.mark.parametrize(
    "frames,options,message",
    [
        (np.zeros((2, 31, 32, 3), np.uint8), {}, r"frames are \(31, 32, 3\); mp4 needs .* even"),
        (np.zeros((2, 32, 32), np.uint8), {}, r"frames are \(32, 32\)"),
        (np.zeros((2, 32, 32, 3)), {}, "frame is float64"),
        (np.zeros((2, 32, 32, 3), np.uint8), {"crf": 0}, "crf is 0; give 1"),
        (np.zeros((2, 32, 32, 3), np.uint8), {"crf": 52}, "crf is 52"),
        (np.zeros((2, 32, 32, 3), np.uint8), {"fps": 0}, "fps is 0"),
        ([], {}, "no frames"),
    ],
)
def test_bad_frames_and_settings_are_refused(tmp_path, frames, options, message):
    with pytest.raises(ValueError, match=message):
        video.write_mp4(tmp_path / "x.mp4", frames, **{"fps": 30, **options})
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")

    def failing():
        yield from moving_gradient(100)  # more than the encoder holds back: the file is begun
        raise RuntimeError("the disk of the frames is gone")

    with pytest.raises(RuntimeError, match="gone"):
        video.write_mp4(path, failing(), 30)
    with pytest.raises(ValueError, match=r"expected uint8 \(48, 64, 3\)"):
        video.write_mp4(path, [*moving_gradient(2), np.zeros((16, 16, 3), np.uint8)], 30)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            video.read_mp4(tmp_path / name)


def saved(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return video.load_image(tmp_path / name)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = saved(tmp_path, Image.new("RGB", (5, 3), "white").convert(mode))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.full((3, 5, 3), 255))


def test_transparent_pixels_become_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 128))
    loaded = saved(tmp_path, image)
    np.testing.assert_array_equal(loaded[0, 0], [255, 255, 255])
    np.testing.assert_allclose(loaded[0, 1], [227, 127, 127], atol=1)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    loaded = saved(tmp_path, palette, transparency=0)
    np.testing.assert_array_equal(loaded, [[[255] * 3, [10, 20, 30]]])


def test_16_bit_greyscale_keeps_its_shades(tmp_path):
    shades = np.array([[0, 0x40FF, 0x8000, 0xFFFF]], np.uint16)
    loaded = saved(tmp_path, Image.fromarray(shades))
    np.testing.assert_array_equal(loaded[..., 0], [[0, 0x40, 0x80, 0xFF]])


def test_cmyk_is_converted(tmp_path):
    loaded = saved(tmp_path, Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "c.jpg", quality=100)
    np.testing.assert_allclose(loaded[4, 4], [0, 255, 255], atol=3)


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), RED)
    loaded = saved(tmp_path, image, exif=exif)
    assert loaded.shape == (4, 2, 3)
    np.testing.assert_array_equal(loaded[0, 1], RED)


def test_a_file_that_is_no_image_is_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(moving_gradient(1)[0]).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tiff")
    for name in ("cut.png", "text.png", "empty.png", "float.tiff", "missing.png"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read.*give a PNG"):
            video.load_image(tmp_path / name)


def test_save_png_is_lossless_and_whole(tmp_path):
    image = moving_gradient(1)[0]
    video.save_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(video.load_image(tmp_path / "a.png"), image)
    with pytest.raises((TypeError, ValueError)):
        video.save_png(tmp_path / "a.png", image[..., :2].astype(np.float32))
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    np.testing.assert_array_equal(video.load_image(tmp_path / "a.png"), image)


def test_contact_sheet_shows_first_and_last_frame_with_their_times():
    shades = np.linspace(0, 200, 25).astype(np.uint8)
    frames = np.broadcast_to(shades[:, None, None, None], (25, 30, 40, 3))
    sheet = video.contact_sheet(frames, fps=24, columns=3, rows=2, cell_width=80)
    assert sheet.dtype == np.uint8
    cells = [sheet[20 + row * 86, 40 + column * 86, 0] for row in (0, 1) for column in (0, 1, 2)]
    np.testing.assert_array_equal(cells, shades[[0, 5, 10, 14, 19, 24]])
    label = sheet[66:86, 6:86]
    assert label.min() < 100 < label.mean(), "dark text on white below the frame"


def test_contact_sheet_of_few_frames_is_small():
    frames = moving_gradient(2)
    assert video.contact_sheet(frames, 30, cell_width=64).shape[1] == 2 * 70 + 6
    assert video.contact_sheet(frames[:1], 30, cell_width=64).shape[1] == 70 + 6
