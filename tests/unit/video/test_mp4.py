"""Videos in and out: round trips, segments joined without encoding, reading, contact sheets."""

import struct
import subprocess
import sys
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from einops import rearrange
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
def test_preview_equals_the_release(golden):
    tensors = load_file(golden / "pipeline.safetensors")
    ours = video.latent_preview(rearrange(tensors["preview/latents"], "b c t h w -> b t h w c"))
    expected = rearrange(tensors["preview/rgb"], "b c t h w -> b t h w c")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


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
        (np.zeros((2, 32, 32, 3), np.uint8), {"fps": 0}, "fps is 0; give 0.1 to 1000"),
        (np.zeros((2, 32, 32, 3), np.uint8), {"fps": float("nan")}, "fps is nan"),
        (np.zeros((2, 32, 32, 3), np.uint8), {"fps": float("inf")}, "fps is inf"),
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


def test_a_full_disk_leaves_the_old_file_and_an_error_with_its_cause(tmp_path):
    """In a process that may not write files above 8 KiB."""
    path = tmp_path / "x.mp4"
    video.write_mp4(path, noise(40), 30)
    old = path.read_bytes()
    script = (
        "import resource, signal, sys\n"
        "import numpy as np\n"
        "from framepack_jax import video\n"
        "path, write = sys.argv[1], sys.argv[2]\n"
        "frames = np.random.default_rng(0).integers(0, 256, (60, 32, 48, 3), np.uint8)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "try:\n"
        "    video.write_mp4(path, frames, 30) if write == 'write' else "
        "video.join_mp4(path, [path, path])\n"
        "except OSError as error:\n"
        "    print('refused', error)\n"
    )
    assert len(old) > 8192
    for action in ("write", "join"):
        done = subprocess.run(
            [sys.executable, "-c", script, path, action], capture_output=True, text=True, check=True
        )
        assert "refused" in done.stdout and "too large" in done.stdout
        assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


READERS = {
    "read_mp4": video.read_mp4,
    "read_frames": lambda path: list(video.read_frames(path)),
    "mp4_info": video.mp4_info,
    "join_mp4": lambda path: video.join_mp4(path.with_name("out.mp4"), [path]),
    "contact_sheet_mp4": video.contact_sheet_mp4,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_file_that_is_no_video_is_named(tmp_path, read):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "folder.mp4").mkdir()
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    video.write_mp4(tmp_path / "whole.mp4", noise(20), 30)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:700])
    for name in ("text.mp4", "folder.mp4", "sound.mp4", "cut.mp4", "missing.mp4"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read(tmp_path / name)
    assert not list(tmp_path.glob("out.mp4*"))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_file_that_is_cut_short_is_named(tmp_path, read):
    video.write_mp4(tmp_path / "whole.mp4", noise(20), 30)
    data = (tmp_path / "whole.mp4").read_bytes()
    for size in (len(data) // 2, len(data) - 5):
        (tmp_path / "cut.mp4").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut.mp4 cannot be read"):
            read(tmp_path / "cut.mp4")
    assert not list(tmp_path.glob("out.mp4*"))


@pytest.mark.parametrize("fps", [None, 20])
def test_frames_are_decoded_as_they_are_wanted(tmp_path, fps):
    """The damage at the end of a file shows when reading gets there."""
    path = tmp_path / "cut.mp4"
    video.write_mp4(path, noise(40), 30)
    path.write_bytes(path.read_bytes()[:-5])
    frames = video.read_frames(path, fps)
    assert [next(frames).shape for _ in range(10)] == [(32, 48, 3)] * 10
    with pytest.raises(ValueError, match=r"cut.mp4 cannot be read"):
        list(frames)


def test_joining_refuses_a_segment_that_lacks_whole_frames(tmp_path):
    path = tmp_path / "whole.mp4"
    video.write_mp4(path, noise(20), 30)
    with av.open(path) as container:
        last = [packet for packet in container.demux(video=0) if packet.size][-1].pos
    path.write_bytes(path.read_bytes()[:last])
    with pytest.raises(ValueError, match=r"whole.mp4 cannot be read .*cut short: 19 of 20 frames"):
        video.join_mp4(tmp_path / "out.mp4", [path])


def noise(frames, seed=0, size=(32, 48)):
    """Frames that need many bytes, with motion, so that the encoder uses B-frames."""
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 128, (*size, 3))
    return np.stack([np.roll(still, t, 1) + 3 * t for t in range(frames)]).astype(np.uint8)


def written(tmp_path, lengths, fps=30):
    """Segments of so many frames, each different, and all their frames decoded one by one."""
    paths = [tmp_path / f"segment_{i}.mp4" for i in range(len(lengths))]
    for i, (path, length) in enumerate(zip(paths, lengths, strict=True)):
        video.write_mp4(path, noise(length, seed=i), fps)
    return paths, np.concatenate([video.read_mp4(path)[0] for path in paths])


@pytest.mark.parametrize(
    "lengths,fps",
    [
        ([13], 30),
        ([1], 24),
        ([1, 1, 1], 30),
        ([1, 33, 2, 1, 3, 36, 1], 24),
        ([36, 1, 1, 36], 23.976),
        ([9] * 40, 30),
    ],
)
def test_joined_segments_are_one_video_of_the_same_bits(tmp_path, lengths, fps):
    paths, expected = written(tmp_path, lengths, fps)
    video.join_mp4(tmp_path / "video.mp4", paths)
    back, rate = video.read_mp4(tmp_path / "video.mp4")
    np.testing.assert_array_equal(back, expected)
    assert rate == fps
    data = (tmp_path / "video.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come first"
    with av.open(tmp_path / "video.mp4") as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert stream.frames == sum(lengths) and stream.start_time == 0
        assert stream.duration * stream.time_base == sum(lengths) / Fraction(str(fps))
        tags = codec.colorspace, codec.color_range, codec.color_primaries, codec.color_trc
        assert tags == (1, 1, 1, 1)
        packets = [packet for packet in container.demux(stream) if packet.size]
        tick = 1 / Fraction(str(fps)) / stream.time_base
        assert sorted(packet.pts for packet in packets) == [i * tick for i in range(sum(lengths))]
        assert set(np.diff([packet.dts for packet in packets])) <= {tick}
        assert all(packet.dts <= packet.pts for packet in packets)


@pytest.mark.parametrize("lengths,fps", [([1, 8, 1, 20, 30], 30), ([13], 24), ([9] * 4, 23.976)])
def test_a_fragmented_video_grows_by_segments(tmp_path, lengths, fps):
    """What has come can be played, with the frames and the times of the joined video."""
    paths, expected = written(tmp_path, lengths, fps)
    video.join_mp4(tmp_path / "joined.mp4", paths)
    came, end = b"", 0
    for piece, length in zip(video.fragment_mp4(iter(paths)), lengths, strict=True):
        came, end = came + piece, end + length
        (tmp_path / "came.mp4").write_bytes(came)
        frames, times = zip(*shown(tmp_path / "came.mp4"), strict=True)
        np.testing.assert_array_equal(frames, expected[:end])
        assert list(times) == [number / Fraction(str(fps)) for number in range(end)]
    assert came.count(b"moov") == 1 and came.count(b"moof") == len(lengths)


def shown(path):
    """The frames of a file with their times in seconds."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            picture = frame.reformat(format="rgb24", interpolation="BICUBIC").to_ndarray()
            yield picture, frame.pts * stream.time_base


def test_seeking_in_a_joined_video_finds_the_frame(tmp_path):
    paths, expected = written(tmp_path, [5, 13, 1, 20])
    video.join_mp4(tmp_path / "video.mp4", paths)
    for number in (4, 5, 17, 18, 19, 30, 38):
        with av.open(tmp_path / "video.mp4") as container:
            stream = container.streams.video[0]
            time = int(Fraction(number, 30) / stream.time_base)
            container.seek(time, stream=stream)
            frames = container.decode(stream)
            first = next(frames)
            starts = [start for start in (0, 5, 18, 19) if start <= number]
            assert first.pts == Fraction(starts[-1], 30) / stream.time_base, "nearest segment"
            frame = next((f for f in [first, *frames] if f.pts == time), None)
            picture = frame.reformat(format="rgb24", interpolation="BICUBIC").to_ndarray()
            np.testing.assert_array_equal(picture, expected[number])


def test_a_joined_video_can_grow_at_both_ends(tmp_path):
    (a, b, c), expected = written(tmp_path, [4, 9, 3])
    out = tmp_path / "video.mp4"
    video.join_mp4(out, [b])
    video.join_mp4(out, [a, out])
    video.join_mp4(out, [out, c])
    np.testing.assert_array_equal(video.read_mp4(out)[0], expected)


def test_segments_that_do_not_fit_are_named(tmp_path):
    names = ("good", "size", "rate", "settings")
    good, size, rate, settings = (tmp_path / f"{name}.mp4" for name in names)
    video.write_mp4(good, noise(3), 30)
    video.write_mp4(size, noise(3, size=(48, 32)), 30)
    video.write_mp4(rate, noise(3), 24)
    video.write_mp4(settings, noise(3), 30, crf=40)
    codec = tmp_path / "codec.mp4"
    with av.open(codec, "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height = 48, 32
        for frame in noise(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    out = tmp_path / "out.mp4"
    out.write_bytes(b"old")
    for other, message in {
        size: r"size.mp4 is h264, 48 x 32 pixels, 30 fps, not .*32 x 48 .*good.mp4",
        rate: r"rate.mp4 is .*24 fps, not .*30 fps as is .*good.mp4; write all segments with",
        settings: r"settings.mp4 was encoded with other settings .*good.mp4",
        codec: r"codec.mp4 is mpeg4",
    }.items():
        with pytest.raises(ValueError, match=message):
            video.join_mp4(out, [good, good, other])
    variable = with_times(tmp_path / "variable.mp4", [0, 33, 100, 110], seed=9)
    with pytest.raises(ValueError, match=r"variable.mp4 cannot be read \(its frame rate varies"):
        video.join_mp4(out, [variable])
    with pytest.raises(ValueError, match="no segments to join into"):
        video.join_mp4(out, [])
    assert out.read_bytes() == b"old" and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("frames,fps", [(1, 30), (2, 24), (61, 23.976)])
def test_info_counts_the_frames(tmp_path, frames, fps):
    video.write_mp4(tmp_path / "a.mp4", noise(frames), fps)
    assert video.mp4_info(tmp_path / "a.mp4") == (frames, fps, 32, 48)
    assert len(list(video.read_frames(tmp_path / "a.mp4"))) == frames


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_single_frames_are_those_of_the_whole_video(tmp_path, suffix):
    (a, b), expected = written(tmp_path, [20, 13])
    video.join_mp4(tmp_path / "a.mp4", [a, b])
    times = [round(i * 1000 / 30) ** 2 // 100 for i in range(33)]
    path = tmp_path / "a.mp4"
    if suffix == "mkv":
        path = with_times(tmp_path / "a.mkv", times)
        expected = np.stack(list(video.read_frames(path)))
    numbers = [0, 31, 19, 20, 20, 7, 32]
    back = np.stack(list(video.read_frames_at(path, numbers)))
    np.testing.assert_array_equal(back, expected[numbers])
    for number in (-1, 33):
        with pytest.raises(ValueError, match=f"cannot be read .frame {number} of 33 does not"):
            list(video.read_frames_at(path, [number]))


def with_times(path, times, seed=0, shades=None, last=33):
    """A video whose frames begin at `times` milliseconds; frame i has the grey `shades[i]`."""
    frames = noise(len(times), seed)
    if shades is not None:
        frames = np.broadcast_to(np.array(shades, np.uint8)[:, None, None, None], (*frames.shape,))
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(lasting(last, stream.encode(frame)))
        container.mux(lasting(last, stream.encode(None)))
    return path


def lasting(milliseconds, packets):
    """Packets of that duration, which counts for the last one in a file."""
    for packet in packets:
        packet.duration = milliseconds
    return packets


def shades_of(frames):
    return [round(frame.mean() / 20) for frame in frames]


@pytest.mark.parametrize("first", [0, 1, 37, 297])
def test_a_span_is_what_it_is_in_the_whole_video(tmp_path, first):
    """Also far from a key frame, of which a coder gives one in 250 frames."""
    frames, path = moving_gradient(300, 16, 32), tmp_path / "out.mp4"
    video.write_mp4(path, frames, fps=30)
    whole, _ = video.read_mp4(path)
    assert np.array_equal(video.read_span(path, 30, first, 3, (16, 32)), whole[first : first + 3])
    with pytest.raises(ValueError, match="ends before frame 300"):
        video.read_span(path, 30, first, 301 - first, (16, 32))


@pytest.mark.parametrize(
    "fps,expected",
    [
        (10, [0, 1, 1, 2, 4, 4, 4, 4, 4, 4]),
        (20, [0, 0, 1, 1, 1, 1, 2, 3, *[4] * 12]),
        (2, [0, 4]),
        (0.1, [0]),
    ],
)
def test_a_variable_rate_becomes_constant(tmp_path, fps, expected):
    shades = [20 * i for i in range(5)]
    path = with_times(tmp_path / "v.mp4", [0, 77, 300, 333, 367], shades=shades, last=633)
    assert shades_of(video.read_frames(path, fps)) == expected
    assert shades_of(video.read_frames(path)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_constant_rate_rounded_to_milliseconds_stays_as_it_is(tmp_path, suffix):
    times = [round(i * 1000 / 30) for i in range(50)]
    path = with_times(tmp_path / f"v.{suffix}", times, last=33)
    same = list(video.read_frames(path, 30))
    np.testing.assert_array_equal(same, list(video.read_frames(path)))
    assert len(list(video.read_frames(path, 60))) == 100
    assert len(list(video.read_frames(path, 15))) == 25
    np.testing.assert_array_equal(list(video.read_frames(path, 15)), same[::2])


def test_a_late_start_is_the_first_frame(tmp_path):
    path = with_times(tmp_path / "v.mkv", [500, 600], shades=[0, 40], last=100)
    assert shades_of(video.read_frames(path, 20)) == [0, 0, 2, 2]


def test_impossible_rates_are_refused_before_reading(tmp_path):
    for fps in (0, -1, float("nan"), 10**6):
        with pytest.raises(ValueError, match=f"fps is {fps}; give"):
            video.read_frames(tmp_path / "missing.mp4", fps)


MATRICES = {
    0: [1, 0, 0, 1],
    90: [0, 1, -1, 0],  # what telephones write for upright pictures: turn it clockwise
    180: [-1, 0, 0, -1],
    270: [0, -1, 1, 0],
}


@pytest.mark.parametrize("clockwise", MATRICES)
def test_a_turned_video_is_read_upright(tmp_path, clockwise):
    path = tmp_path / "turned.mp4"
    video.write_mp4(path, noise(3), 30)
    stored, _ = video.read_mp4(path)
    data = bytearray(path.read_bytes())
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))
    a, b, c, d = (65536 * x for x in MATRICES[clockwise])
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    upright, _ = video.read_mp4(path)
    np.testing.assert_array_equal(upright, np.rot90(stored, -clockwise // 90, axes=(1, 2)))
    assert video.mp4_info(path)[2:] == upright.shape[1:3]


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, GREY], ids=str)
@pytest.mark.parametrize(
    "matrix,scale", [(Colorspace.ITU601, "MPEG"), (Colorspace.ITU601, "JPEG"), (9, "MPEG")]
)
def test_colours_are_read_by_their_tags(tmp_path, colour, matrix, scale):
    scale = ColorRange[scale]
    with av.open(tmp_path / "c.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.color_range = scale
        stream.codec_context.colorspace = 9 if matrix == 9 else 6
        frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), colour, np.uint8))
        frame = frame.reformat(
            format="yuv420p", dst_colorspace=matrix, dst_color_range=scale, interpolation="BICUBIC"
        )
        container.mux([*stream.encode(frame), *stream.encode(None)])
    (back,) = video.read_frames(tmp_path / "c.mp4")
    assert np.abs(back.astype(int) - np.array(colour)[None, None]).max() <= 3


def test_reading_and_writing_keep_few_frames(tmp_path):
    """300 frames of 144 KiB are 42 MiB; a handful are less than 4."""
    frame = np.zeros((192, 256, 3), np.uint8)
    tracemalloc.start()
    video.write_mp4(tmp_path / "long.mp4", (frame + np.uint8(t % 200) for t in range(300)), 30)
    assert sum(1 for _ in video.read_frames(tmp_path / "long.mp4")) == 300
    assert sum(1 for _ in video.read_frames(tmp_path / "long.mp4", 60)) == 600
    video.contact_sheet_mp4(tmp_path / "long.mp4", cell_width=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert frame.nbytes < peak < 4 * 2**20


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


@pytest.mark.parametrize("frames", [1, 3, 30])
def test_the_contact_sheet_of_a_file_is_that_of_its_frames(tmp_path, frames):
    video.write_mp4(tmp_path / "a.mp4", moving_gradient(frames), 24)
    expected = video.contact_sheet(*video.read_mp4(tmp_path / "a.mp4"), cell_width=96)
    sheet = video.contact_sheet_mp4(tmp_path / "a.mp4", cell_width=96)
    np.testing.assert_array_equal(sheet, expected)


def fitted_colours(latents):
    """The fit is to pixels in [-1, 1]."""
    rgb = latents @ video.PREVIEW_WEIGHT + video.PREVIEW_BIAS
    return np.clip(np.round((rgb + 1) * 127.5), 0, 255)


@pytest.mark.parametrize("frames,cells", [(1, 1), (9, 9), (12, 12), (40, 12)])
def test_the_preview_sheet_shows_latents_from_first_to_last(frames, cells):
    latents = np.zeros((frames, 6, 10, 16), np.float32)
    latents[:, :, :, 10] = np.linspace(0, 6, frames)[:, None, None]
    sheet = video.preview_sheet(latents, "section 3 of 5, step 10 of 25")
    columns, rows = min(cells, 4), -(-cells // 4)
    # Cells of 160 x 96: 16 pixels a latent pixel; the caption below, wider than one cell.
    assert sheet.dtype == np.uint8
    assert sheet.shape[0] == rows * (96 + 6) + 6 + 20
    assert sheet.shape[1] == columns * (160 + 6) + 6 if columns > 1 else 172 < sheet.shape[1] < 250
    assert (sheet[:, -6:] == 255).all()
    picks = np.linspace(0, frames - 1, cells).round().astype(int)
    for cell, pick in enumerate(picks):
        y, x = 6 + cell // 4 * 102, 6 + cell % 4 * 166
        colour = fitted_colours(latents[pick, 0, 0])
        assert (sheet[y : y + 96, x : x + 160] == colour[None, None]).all()
    strip = sheet[-20:]
    assert strip.min() < 100 < strip.mean(), "dark text on white"
    assert (video.preview_sheet(latents, "")[-20:] == 255).all()


def test_each_latent_pixel_is_a_square_of_the_preview():
    latents = np.random.default_rng(0).normal(size=(1, 3, 7, 16)).astype(np.float32)
    sheet = video.preview_sheet(latents, "x")
    cell = sheet[6 : 6 + 3 * 23, 6 : 6 + 7 * 23]  # 7 x 23 = 161 pixels wide
    colours = fitted_colours(latents[0])
    np.testing.assert_array_equal(cell, colours.repeat(23, 0).repeat(23, 1))
