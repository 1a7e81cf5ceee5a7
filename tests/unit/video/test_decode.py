"""Videos read as players show them: streams, times, fields, geometry and colours of any file."""

import itertools
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from framepack_jax import video

SIZE = HEIGHT, WIDTH = 48, 64
# Four colours of an sRGB screen, in the quarters of a picture.
QUARTERS = np.array([[[200, 30, 40], [30, 180, 60]], [[30, 50, 200], [128, 128, 128]]], np.uint8)
PICTURE = QUARTERS.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)


def bars(frames, size=SIZE):
    """Frame k is grey 4 k + 20, at most white; a white bar moves by two pixels a frame."""
    pictures = np.empty((frames, *size, 3), np.uint8)
    for k, picture in enumerate(pictures):
        picture[:] = min(255, 4 * k + 20)
        picture[:, (2 * k) % size[1] : (2 * k) % size[1] + 6] = 255
    return pictures


def write(path, frames, codec="libx264", rate=25, pix_fmt="yuv420p", options=None, aspect=None):
    """Encode frames, arrays or `av.VideoFrame`s, with a codec of the given options."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        first = frames[0]
        height, width = first.shape[:2] if isinstance(first, np.ndarray) else SIZE
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(frame)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def quarters(picture):
    height, width = picture.shape[:2]
    return picture[height // 4 :: height // 2, width // 4 :: width // 2].astype(int)


def shades(frames):
    """The number k of each frame of `bars`."""
    return [round((int(np.median(frame)) - 20) / 4) for frame in frames]


KINDS = {
    "avi": ("libx264", {"bf": "2"}),
    "mkv": ("libx264", {"bf": "2", "g": "12"}),
    "ts": ("libx264", {"bf": "2", "g": "12"}),
    "mpg": ("mpeg2video", {"bf": "2", "b": "4M"}),
    "vob": ("mpeg2video", {"b": "4M"}),
    "flv": ("flv", {"b": "4M"}),
    "wmv": ("wmv2", {"b": "4M"}),
    "mts": ("libx264", {"bf": "2"}),
    "webm": ("libvpx-vp9", {"cpu-used": "8"}),
    "gif": ("gif", {}),
    "3gp": ("libx264", {}),
}


@pytest.mark.parametrize("suffix", KINDS)
def test_every_container_has_its_frames_in_order(tmp_path, suffix):
    """AVI has no times of showing; program streams have wrong ones after a seek."""
    codec, options = KINDS[suffix]
    pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
    frames = [*bars(40)]
    known = {"mts": "ts", "3gp": "mp4"}.get(suffix, suffix)
    path = write(tmp_path / f"a.{known}", frames, codec, pix_fmt=pix_fmt, options=options)
    path = path.rename(tmp_path / f"a.{suffix}")
    whole = list(video.read_frames(path))
    assert len(whole) == 40 and video.mp4_info(path) == (40, 25, *SIZE)
    if codec != "gif":  # which has 256 colours
        assert shades(whole) == list(range(40))
    for fps in (30, 20):
        steady = list(video.read_frames(path, fps))
        # At k / fps the last frame that began by then; the 40 frames last 1.6 s.
        expected = [k * 25 // fps for k in range(round(1.6 * fps))]
        np.testing.assert_array_equal(steady, [whole[number] for number in expected])
        assert video.count_frames(path, fps) == len(steady)
        for first in (0, 21, len(steady) - 3):
            span = video.read_span(path, fps, first, 3, SIZE)
            np.testing.assert_array_equal(span, steady[first : first + 3])
            rest = itertools.islice(video.read_frames(path, fps, first), 3)
            np.testing.assert_array_equal(list(rest), span)
    np.testing.assert_array_equal(list(video.read_frames_at(path, [39, 5])), [whole[39], whole[5]])


def test_a_frame_that_is_repeated_is_the_same_array(tmp_path):
    path = write(tmp_path / "a.mp4", [*bars(8)], rate=8)
    frames = list(video.read_frames(path, 30))
    repeated = [a is b for a, b in itertools.pairwise(frames)]
    assert len(frames) == 30 and sum(repeated) == 30 - 8


def test_a_long_gap_between_frames_is_counted(tmp_path):
    """A variable rate, as of screen recordings: the last frame begins 5 s after the one before."""
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, picture in zip((0, 40, 1000, 6000), bars(4), strict=True):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frames = list(video.read_frames(tmp_path / "a.mkv", 30))
    assert video.count_frames(tmp_path / "a.mkv", 30) == len(frames) > 180
    assert shades(frames[::30]) == [0, 2, 2, 2, 2, 2, 3][: len(frames[::30])]


def test_a_cover_picture_is_no_video(tmp_path):
    for name, cover in (("sound.m4a", False), ("album.m4a", True)):
        with av.open(tmp_path / name, "w", format="mp4") as container:
            sound = container.add_stream("aac", rate=48000)
            if cover:
                picture = container.add_stream("mjpeg", rate=1)
                picture.height, picture.width, picture.pix_fmt = *SIZE, "yuvj420p"
                picture.disposition = Disposition.attached_pic
                container.mux(picture.encode(av.VideoFrame.from_ndarray(PICTURE)))
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 48000
            container.mux([*sound.encode(frame), *sound.encode(None)])
    with pytest.raises(ValueError, match=r"sound.m4a cannot be read \(it has sound but no video\)"):
        next(video.read_frames(tmp_path / "sound.m4a"))
    with pytest.raises(ValueError, match=r"it has sound and a cover picture but no video"):
        video.mp4_info(tmp_path / "album.m4a")


def test_a_second_stream_that_is_a_cover_is_passed_over(tmp_path):
    with av.open(tmp_path / "a.mkv", "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 200, 200, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        container.mux(cover.encode(av.VideoFrame(200, 200, "yuvj420p")))
        for picture in bars(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    assert shades(video.read_frames(tmp_path / "a.mkv")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("suffix", ["mkv", "flv"])
def test_a_file_without_its_end_says_how_much_is_there(tmp_path, suffix):
    codec = {"mkv": "libx264", "flv": "flv"}[suffix]
    data = write(tmp_path / f"whole.{suffix}", [*bars(60)], codec).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: len(data) // 2])
    message = r"cut short(:| at frame) \d+ of about (59|60)"
    with pytest.raises(ValueError, match=message):
        list(video.read_frames(path))
    with pytest.raises(ValueError, match=message):
        video.count_frames(path, 30)
    with pytest.raises(ValueError, match=message):
        list(video.read_frames(path, 30, 10))


def test_sound_may_be_longer_than_the_picture(tmp_path):
    """The header of a .wmv says how long the file lasts."""
    with av.open(tmp_path / "a.wmv", "w") as container:
        picture, sound = (container.add_stream(c, rate=r) for c, r in (("wmv2", 25), ("aac", 8000)))
        picture.height, picture.width, picture.pix_fmt = *SIZE, "yuv420p"
        for frame in bars(25):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(frame)))
        for k in range(24):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, 1024 * k
            container.mux(sound.encode(frame))
        container.mux([*picture.encode(None), *sound.encode(None)])
    with av.open(tmp_path / "a.wmv") as container:
        assert container.duration > 2.5 * av.time_base
    assert len(list(video.read_frames(tmp_path / "a.wmv"))) == 25
    assert video.count_frames(tmp_path / "a.wmv", 30) == 30


def test_files_put_one_behind_the_other_are_refused(tmp_path):
    data = write(tmp_path / "part.ts", [*bars(30)]).read_bytes()
    (tmp_path / "joined.ts").write_bytes(data + data)
    with pytest.raises(ValueError, match=r"times jump from [\d.]+ to [\d.]+ s.*ffmpeg -f concat"):
        list(video.read_frames(tmp_path / "joined.ts", 30))


def test_a_video_whose_size_changes_is_deinterlaced_on(tmp_path):
    options = {"crf": "1", "x264-params": "tff=1:keyint=6"}
    small = write(tmp_path / "a.ts", [*bars(12)], options=options)
    large = write(tmp_path / "b.ts", [*bars(12, (64, 96))], options=options)
    (tmp_path / "ab.ts").write_bytes(small.read_bytes() + large.read_bytes())
    shapes = [frame.shape[:2] for frame in video.read_frames(tmp_path / "ab.ts")]
    assert shapes[0] == SIZE and shapes[-1] == (64, 96) and len(shapes) >= 22


def test_a_transport_stream_cut_within_a_frame_is_damaged_there(tmp_path):
    rng = np.random.default_rng(0)
    noise = list(rng.integers(0, 256, (30, *SIZE, 3), np.uint8))
    data = write(tmp_path / "whole.ts", noise).read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(ValueError, match=r"damaged or cut short at frame \d+ of about \d+"):
        list(video.read_frames(tmp_path / "cut.ts"))


@pytest.mark.parametrize("aspect,shown", [((2, 1), (48, 128)), ((8, 9), (54, 64)), ((1, 1), SIZE)])
def test_pixels_that_are_not_square_are_stretched(tmp_path, aspect, shown):
    path = write(tmp_path / "a.mp4", [PICTURE] * 3, aspect=Fraction(*aspect))
    (picture, *_) = video.read_frames(path)
    assert picture.shape[:2] == shown == video.mp4_info(path)[2:]
    assert np.abs(quarters(picture) - QUARTERS).max() < 12


# The matrix of the movie header -> what it does to a stored picture, by its definition: a pixel at
# (x, y) is shown at (a x + c y, b x + d y).
MATRICES = {
    "mirrored left to right": ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
    "mirrored upside down": ((1, 0, 0, -1), lambda a: a[::-1]),
    "transposed": ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda a: a[::-1, ::-1].swapaxes(0, 1)),
    "turned clockwise": ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_the_whole_display_matrix_counts(tmp_path, name):
    path = write(tmp_path / "a.mp4", [PICTURE] * 2)
    stored = next(video.read_frames(path))
    matrix, shown = MATRICES[name]
    data = bytearray(path.read_bytes())
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))
    a, b, c, d = (65536 * x for x in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    np.testing.assert_array_equal(next(video.read_frames(path)), shown(stored))
    assert video.mp4_info(path)[2:] == shown(stored).shape[:2]


def test_interlaced_frames_have_straight_edges(tmp_path):
    """A bar moves by two pixels a field: the rows of a stored frame show it at two places."""
    fields = bars(40)
    woven = [np.empty_like(fields[0]) for _ in range(20)]
    for k, frame in enumerate(woven):
        frame[::2], frame[1::2] = fields[2 * k][::2], fields[2 * k + 1][1::2]
    options = {"crf": "1", "x264-params": "tff=1:keyint=6"}
    path = write(tmp_path / "a.mp4", woven, options=options)
    frames = np.stack(list(video.read_frames(path)))
    assert len(frames) == 20 == video.mp4_info(path).frames
    edges = (frames[10, 12:36, :, 0] > 180).argmax(axis=1)
    assert np.ptp(edges) <= 1, "the rows of a frame are of one time"
    assert np.ptp((woven[10][12:36, :, 0] > 180).argmax(axis=1)) == 2
    steady = list(video.read_frames(path, 30))
    for first in (5, 7, 12, 20):
        span = video.read_span(path, 30, first, 2, SIZE)
        np.testing.assert_array_equal(span, steady[first : first + 2])


def test_transparent_frames_are_laid_on_white(tmp_path):
    image = Image.new("P", (64, 48), 0)
    image.putpalette([0, 0, 0, 200, 30, 40])
    image.paste(1, (0, 0, 32, 48))
    image.save(tmp_path / "a.gif", save_all=True, append_images=[image.copy()], transparency=0)
    (picture, *_) = video.read_frames(tmp_path / "a.gif")
    np.testing.assert_array_equal(picture[10, [10, 50]], [[200, 30, 40], [255, 255, 255]])


@pytest.mark.parametrize("height,matrix", [(720, "ITU709"), (704, "ITU601")])
def test_untagged_videos_are_read_by_their_height(tmp_path, height, matrix):
    picture = QUARTERS.repeat(height // 2, 0).repeat(WIDTH // 2, 1)
    frame = av.VideoFrame.from_ndarray(picture).reformat(format="yuv420p", dst_colorspace=matrix)
    frame.colorspace = 2
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = height, WIDTH, "yuv420p"
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with av.open(tmp_path / "a.mp4") as container:
        assert container.streams.video[0].codec_context.colorspace == 2, "unspecified"
    assert np.abs(quarters(next(video.read_frames(tmp_path / "a.mp4"))) - QUARTERS).max() <= 4


# SMPTE ST 2084 and ITU-R BT.2100 with their constants as printed; the other way than the decoder.
def pq(nits):
    y = (np.asarray(nits, float) / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(nits):
    luminance = np.asarray(nits, float) @ [0.2627, 0.6780, 0.0593]
    scene = nits / 1000 * np.maximum(luminance / 1000, 1e-9)[..., None] ** (1 / 1.2 - 1)
    curve = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), curve)


# ITU-R BT.2087: linear light of BT.709 in the primaries of BT.2020.
TO_2020 = np.array(
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
)  # fmt: skip


def write_2020(path, signal, transfer, matrix=9):
    """R'G'B' (H, W, 3) from 0 to 1 as 10-bit YCbCr of BT.2020, tagged with codes of H.273."""
    luma = signal @ [0.2627, 0.6780, 0.0593]
    planes = (
        64 + 876 * luma,
        (512 + 896 * (signal[:, :, 2] - luma) / 1.8814)[::2, ::2],
        (512 + 896 * (signal[:, :, 0] - luma) / 1.4746)[::2, ::2],
    )
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *signal.shape[:2], "yuv420p10le"
        codec = stream.codec_context
        codec.colorspace, codec.color_primaries, codec.color_trc = matrix, 9, transfer
        codec.color_range = 1
        for _ in range(3):
            frame = av.VideoFrame(stream.width, stream.height, "yuv420p10le")
            for plane, levels in zip(frame.planes, planes, strict=True):
                padded = np.zeros((plane.height, plane.line_size // 2), np.uint16)
                padded[:, : levels.shape[1]] = levels.round()
                plane.update(padded.tobytes())
            frame.colorspace, frame.color_range = matrix, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def light(levels):
    """Linear light of an sRGB screen."""
    levels = np.asarray(levels) / 255
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("transfer,curve", [(16, pq), (18, hlg)], ids=["PQ", "HLG"])
def test_hdr_looks_like_the_picture_that_it_was_made_of(tmp_path, transfer, curve):
    """White paper has 203 cd/m2 (ITU-R BT.2408); untagged decoding is off by 60 and more."""
    nits = 203 * light(PICTURE) @ TO_2020.T
    path = write_2020(tmp_path / "a.mp4", curve(nits), transfer)
    assert np.abs(quarters(next(video.read_frames(path, 30))) - QUARTERS).max() <= 8


@pytest.mark.parametrize("transfer,curve", [(16, pq), (18, hlg)], ids=["PQ", "HLG"])
def test_light_brighter_than_paper_is_compressed(tmp_path, transfer, curve):
    """By ITU-R BT.2390 dark levels stay, and 1000 cd/m2 are as bright as the screen."""
    levels = np.array([20.0, 80, 203, 300, 400, 1000])
    nits = levels.repeat(24)[None, :, None].repeat(32, 0).repeat(3, 2)
    path = write_2020(tmp_path / "a.mp4", curve(nits), transfer)
    seen = next(video.read_frames(path))[16, 12::24].astype(int)
    assert np.ptp(seen, axis=1).max() <= 2, "grey stays grey"
    found = seen.mean(axis=1)
    plain = 255 * (1.055 * (levels / 203) ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(found[:2], plain[:2], atol=2.5)
    assert (np.diff(found) > 3).all() and 220 < found[2] < 240 and found[5] >= 253


def test_bt2020_without_hdr_changes_its_primaries_alone(tmp_path):
    """Made on a screen of exponent 2.4, and shown with its levels, as BT.709 is."""
    signal = (light(PICTURE) @ TO_2020.T) ** (1 / 2.4)
    path = write_2020(tmp_path / "a.mp4", signal, 14)
    expected = 255 * light(QUARTERS) ** (1 / 2.4)
    assert np.abs(quarters(next(video.read_frames(path))) - expected).max() <= 4


def test_colours_of_an_unknown_form_are_refused(tmp_path):
    path = write_2020(tmp_path / "a.mp4", light(PICTURE), 16, matrix=14)
    message = r"matrix 14 of ITU-T H.273\), which cannot be tone-mapped to BT.709; convert it"
    with pytest.raises(ValueError, match=message):
        next(video.read_frames(path))
