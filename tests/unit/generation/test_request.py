"""Requests: sizes, times, source videos."""

import dataclasses

import numpy as np
import pytest

from framepack_jax import packing, video
from framepack_jax.generation.geometry import Geometry
from framepack_jax.generation.layout import fit_images, make_layout
from framepack_jax.generation.request import Request, SourceVideo, read_source, source_from_frames

INVERTED = Geometry(packing.parse(packing.RELEASED_INVERTED), 4, 16)
F1 = Geometry(packing.parse(packing.RELEASED_F1), 4, 16)
IMAGE = np.zeros((50, 40, 3), np.uint8)


def test_sizes() -> None:
    """The bucket of the image, or any even size, sampled at what the VAE divides."""
    small = dataclasses.replace(F1, buckets=((64, 96), (96, 64)))
    assert make_layout(small, Request("", IMAGE)).canvas == (96, 64)
    assert make_layout(small, Request("")).canvas == (64, 96)
    assert make_layout(F1, Request("", IMAGE)).canvas == (704, 544)
    assert make_layout(F1, Request("")).canvas == (480, 832)
    layout = make_layout(F1, Request("", IMAGE), height=90, width=50)
    assert (layout.height, layout.width, layout.canvas) == (90, 50, (96, 64))
    assert fit_images(F1, Request("", IMAGE), layout).image.shape == (96, 64, 3)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ((0, 64), "height = 0"),
        ((64, 73), "width = 73"),
        ((-16, 16), "height = -16"),
        ((64, None), "width = None"),
        ((64, 10**5), "width = 100000"),
    ],
)
def test_impossible_sizes(size, named) -> None:
    with pytest.raises(ValueError, match=named):
        make_layout(F1, Request("", IMAGE), height=size[0], width=size[1])


@pytest.mark.parametrize(
    "image", [IMAGE[..., 0], IMAGE.astype(np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_image(image) -> None:
    for request in (Request("", image), Request("", IMAGE, end_image=image)):
        with pytest.raises(ValueError, match=r"image of shape .* uint8"):
            make_layout(F1, request)


def test_seeds_have_64_bits() -> None:
    for seed in (0, 2**63, 2**64 - 1):
        make_layout(F1, Request("", IMAGE, seed=seed))
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed = {seed}: expected 0 to {2**64 - 1}"):
            make_layout(F1, Request("", IMAGE, seed=seed))


def test_key_frames_in_the_order_of_the_request_and_the_end_last() -> None:
    request = Request("", IMAGE, end_image=IMAGE, key_frames=((1.0, IMAGE), (0.5, IMAGE)))
    assert make_layout(F1, request, sections=1).stills == (8, 4, 9)
    # In an inverted order, a guide follows the video, which a still is a part of.
    for use, length in (("auto", 10), ("guide", 10), ("still", 11)):
        layout = make_layout(INVERTED, dataclasses.replace(request, end_image_as=use), sections=1)
        assert layout.stills == (8, 4, 10) and layout.length == length
        alone = dataclasses.replace(request, key_frames=(), end_image_as=use)
        assert make_layout(INVERTED, alone, sections=1).encoded == (2 if use == "still" else 1)


@pytest.mark.parametrize(
    ("geometry", "use", "named"),
    [(F1, "guide", r"order 'forward' read no frames"), (INVERTED, "last", "expected one of auto")],
)
def test_end_images_that_cannot_be_used(geometry, use: str, named: str) -> None:
    request = Request("", IMAGE, end_image=IMAGE, end_image_as=use)
    with pytest.raises(ValueError, match=f"end_image_as = '{use}'.*{named}"):
        make_layout(geometry, request, sections=1)


def test_the_image_that_leads() -> None:
    """Text alone is led by black, a source video by the frame that sections are anchored at."""
    layout = make_layout(F1, Request(""), sections=1, height=32, width=32)
    assert not fit_images(F1, Request(""), layout).image.any()
    frames = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((32, 32, 3), np.uint8)
    request = Request("", source_video=SourceVideo(5, frames[0], frames))
    for geometry, value in ((F1, 1), (INVERTED, 5)):
        layout = make_layout(geometry, request, sections=1, height=32, width=32)
        assert layout.before == 2 and layout.length == 11
        assert (fit_images(geometry, request, layout).image == value).all()


def test_a_prompt_after_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt at 9 s: the generated video is 1.20 s long"):
        make_layout(F1, Request("0s: a 9s: b", IMAGE), sections=1)


@pytest.mark.parametrize(("frames", "kept"), [(5, 5), (6, 5), (8, 5), (9, 9), (400, 81)])
def test_source_video_is_whole_latents_at_its_end(frames: int, kept: int) -> None:
    pixels = np.arange(frames, dtype=np.uint8)[:, None, None, None] * np.ones((32, 32, 3), np.uint8)
    source = source_from_frames(F1, pixels, 32, 32)
    assert source.frames == (frames - 1) // 4 * 4 + 1 and len(source.last) == kept
    assert source.last[-1, 0, 0, 0] == (source.frames - 1) % 256
    assert (source.first == 0).all()


@pytest.mark.parametrize("fps", [24, 30, 60])
def test_source_video_of_a_file_is_that_of_its_frames(tmp_path, monkeypatch, fps: int) -> None:
    """Only the first frame and the frames at the end are scaled."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 32, 48, 3), np.uint8)
    video.write_mp4(tmp_path / "video.mp4", pixels, fps)
    scaled = []

    def scale(frame: np.ndarray, height: int, width: int) -> np.ndarray:
        scaled.append(frame)
        return video.resize_center_crop(frame, height, width)

    monkeypatch.setattr("framepack_jax.generation.request.resize_center_crop", scale)
    frames = video.read_frames(tmp_path / "video.mp4", 30.0)
    whole = source_from_frames(F1, frames, 16, 20)
    assert len(scaled) == 82
    source = read_source(F1, tmp_path / "video.mp4", 30.0, 16, 20)
    assert source.frames == whole.frames == {24: 249, 30: 197, 60: 97}[fps]
    np.testing.assert_array_equal(source.first, whole.first)
    np.testing.assert_array_equal(source.last, whole.last)


@pytest.mark.parametrize("frames", [0, 1, 4])
def test_too_short_source_video(frames: int) -> None:
    with pytest.raises(ValueError, match="video to extend has"):
        source = source_from_frames(F1, np.zeros((frames, 32, 32, 3), np.uint8), 32, 32)
        make_layout(F1, Request("", source_video=source), sections=1, height=32, width=32)


def test_no_picture_is_zoomed_for_the_canvas() -> None:
    image = np.random.default_rng(0).integers(0, 256, (58, 46, 3), np.uint8)
    layout = make_layout(F1, Request("", image), height=58, width=46)
    prepared = fit_images(F1, Request("", image), layout).image
    assert prepared.shape == (64, 48, 3)
    np.testing.assert_array_equal(prepared[3:61, 1:47], image)
    np.testing.assert_array_equal(prepared[0], prepared[3])


def test_times_count_from_the_end_of_the_source_video() -> None:
    source = source_from_frames(F1, np.zeros((41, 32, 32, 3), np.uint8), 32, 32)
    request = Request("", source_video=source, key_frames=((0.4, IMAGE),))
    layout = make_layout(F1, request, sections=1, height=32, width=32)
    assert layout.stills == (10 + 3,) and layout.encoded == 11
