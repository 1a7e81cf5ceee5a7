"""Splicing against weights over the whole video, cross-fades of the release, pixels to uint8."""

import random
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file

from framepack_jax.generation.crossfade import Interval, Splicer, cross_fade, to_uint8

# By time: a short clip inside its neighbour's start, overlaps of 1 to 6 frames, one that is all
# overlap (12..16), neighbours that only touch (at 25), and a last clip inside the one before it.
CLIPS = [(0, 3), (0, 9), (8, 14), (12, 17), (14, 25), (25, 33), (27, 40), (36, 40)]
ORDERS = {"forward": range(8), "inverted": range(7, -1, -1)} | {
    f"random {seed}": random.Random(seed).sample(range(8), 8) for seed in range(3)
}


def decoded(clips, batch=1, dtype=np.float32):
    """Clips of noise (batch, P, 2, 3, 3) in [-1, 1]."""
    rng = np.random.default_rng(0)
    shapes = [(batch, stop - start, 2, 3, 3) for start, stop in clips]
    return [jnp.asarray(rng.uniform(-1, 1, shape), dtype) for shape in shapes]


def brute_force(clips, frames):
    """The video as a weighted sum over all clips: in an overlap the earlier goes from 1 to 0."""
    weights = [np.ones(stop - start) for start, stop in clips]
    by_time = sorted(range(len(clips)), key=lambda n: clips[n])
    for a, b in pairwise(by_time):
        overlap = clips[a][1] - clips[b][0]
        ramp = np.linspace(1, 0, overlap)
        weights[a][len(weights[a]) - overlap :] *= ramp
        weights[b][:overlap] *= 1 - ramp
    batch = frames[0].shape[0]
    video = np.zeros((batch, max(stop for _, stop in clips), 2, 3, 3))
    for (start, stop), weight, clip in zip(clips, weights, frames, strict=True):
        video[:, start:stop] += weight[None, :, None, None, None] * np.asarray(clip, np.float64)
    return video


def put_together(pieces, frames):
    """The video of pieces (start, frames); every frame must come exactly once."""
    at = [frame for start, piece in pieces for frame in range(start, start + piece.shape[1])]
    assert sorted(at) == list(range(frames))
    return np.concatenate([np.asarray(piece) for _, piece in sorted(pieces, key=lambda p: p[0])], 1)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_any_order_gives_the_weighted_sum(order):
    clips = [Interval(*CLIPS[n]) for n in order]
    frames = decoded(clips, batch=2)
    splicer, pieces = Splicer(clips), []
    for number, (clip, pixels) in enumerate(zip(clips, frames, strict=True)):
        start, piece = splicer.add(number, pixels)
        assert clip.start <= start and start + piece.shape[1] <= clip.stop
        pieces.append((start, piece))
    video = put_together([p for p in pieces if p[1].shape[1]], 40)
    np.testing.assert_allclose(video, brute_force(clips, frames), rtol=0, atol=1e-6)


def test_a_frame_comes_as_soon_as_it_is_final():
    clips = [Interval(12, 33), Interval(4, 17), Interval(0, 5)]
    splicer, frames = Splicer(clips), decoded(clips)
    spans = []
    for number, pixels in enumerate(frames):
        start, piece = splicer.add(number, pixels)
        spans.append((start, start + piece.shape[1]))
    assert spans == [(17, 33), (5, 17), (0, 5)]


def test_a_clip_that_is_all_overlap_waits_with_no_frames():
    splicer = Splicer([Interval(0, 2), Interval(0, 9)])
    start, nothing = splicer.add(0, jnp.ones((1, 2, 2, 3, 3)))
    assert (start, nothing.shape) == (0, (1, 0, 2, 3, 3))
    start, piece = splicer.add(1, jnp.zeros((1, 9, 2, 3, 3)))
    np.testing.assert_array_equal(piece[0, :, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0])
    assert start == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frames_are_those_of_cross_fade_to_the_bit(dtype):
    clips = [Interval(0, 9), Interval(4, 20)]
    a, b = decoded(clips, dtype=dtype)
    for order in ([0, 1], [1, 0]):
        splicer = Splicer([clips[n] for n in order])
        pieces = [splicer.add(i, (a, b)[n]) for i, n in enumerate(order)]
        assert {piece.dtype for _, piece in pieces} == {jnp.dtype(dtype)}
        np.testing.assert_array_equal(put_together(pieces, 20), cross_fade(a, b, 5))


@pytest.mark.parametrize("inverted", [False, True])
def test_what_is_kept_does_not_grow(inverted):
    clips = [Interval(8 * i, 8 * i + 13) for i in range(12)]
    clips = clips[::-1] if inverted else clips
    splicer, most = Splicer(clips), 0
    for number, pixels in enumerate(decoded(clips)):
        splicer.add(number, pixels)
        most = max(most, sum(frames.shape[1] for frames in splicer._held.values()))
    assert most == 5, "one overlap, while the next clip is made"
    assert not splicer._held


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_resuming_goes_on_with_the_same_bits(order):
    clips = [Interval(*CLIPS[n]) for n in order]
    frames = decoded(clips)
    whole = Splicer(clips)
    expected = [whole.add(number, pixels) for number, pixels in enumerate(frames)]
    for done in range(len(clips) + 1):
        splicer = Splicer(clips)
        waiting = splicer.waiting(range(done))
        assert set(waiting) <= set(range(done)) and len(waiting) <= done
        for number in waiting:
            splicer.add(number, frames[number])
        for number in range(done, len(clips)):
            start, piece = splicer.add(number, frames[number])
            assert start == expected[number][0]
            np.testing.assert_array_equal(piece, expected[number][1])


def test_only_clips_at_the_border_wait():
    clips = [Interval(8 * i, 8 * i + 13) for i in range(6)]
    splicer = Splicer(clips)
    assert splicer.waiting([0, 1, 2]) == [2]
    assert splicer.waiting([5, 4, 0]) == [0, 4]
    assert splicer.waiting([]) == splicer.waiting(range(6)) == []
    assert Splicer([Interval(0, 5), Interval(5, 9)]).waiting([0]) == [], "they only touch"


@pytest.mark.parametrize(
    "clips,message",
    [
        ([], "there are no clips"),
        ([(0, 9), (12, 20)], "a gap: frames 9 to 11 are in none"),
        ([(12, 20), (13, 30), (0, 9)], "a gap: frames 9 to 11 are in none"),
        ([(0, 9), (5, 20), (7, 30)], "three clips cover frames 7 to 8"),
        ([(0, 9), (3, 5), (9, 12)], "frames 3 to 4 lies inside that of frames 0 to 8"),
        ([(0, 9), (9, 9)], r"frames 9 to 9 \(excluded\) is empty"),
    ],
)
def test_clips_that_make_no_video_are_refused(clips, message):
    with pytest.raises(ValueError, match=message):
        Splicer([Interval(*clip) for clip in clips])


def test_a_clip_is_taken_once_and_whole():
    splicer = Splicer([Interval(0, 4), Interval(2, 6)])
    with pytest.raises(ValueError, match="clip 0 has 3 frames; it covers frames 0 to 3"):
        splicer.add(0, jnp.zeros((1, 3, 2, 3, 3)))
    splicer.add(0, jnp.zeros((1, 4, 2, 3, 3)))
    with pytest.raises(ValueError, match="clip 0 was added before"):
        splicer.add(0, jnp.zeros((1, 4, 2, 3, 3)))
    with pytest.raises(ValueError, match="clip 2 does not exist; add each of 2 clips once"):
        splicer.add(2, jnp.zeros((1, 4, 2, 3, 3)))
    with pytest.raises(ValueError, match=r"clips \[7\] do not exist; there are 2"):
        splicer.waiting([7])


@pytest.mark.golden
def test_cross_fade_equals_the_release(golden):
    tensors = load_file(golden / "pipeline.safetensors")
    names = ("blend/history", "blend/current", "blend/overlap5")
    earlier, later, expected = (
        jnp.asarray(rearrange(tensors[name], "b c t h w -> b t h w c")) for name in names
    )
    np.testing.assert_allclose(cross_fade(earlier, later, 5), expected, rtol=0, atol=1e-6)


def test_cross_fade_goes_linearly_from_one_to_the_other():
    joined = cross_fade(jnp.ones((4, 2)), jnp.zeros((5, 2)), 3, axis=0)
    np.testing.assert_allclose(joined[:, 0], [1, 1, 0.5, 0, 0, 0], atol=1e-7)
    single = cross_fade(jnp.ones((1, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16), 1)
    assert single.dtype == jnp.bfloat16
    np.testing.assert_array_equal(single[0], [1, 0])


@pytest.mark.parametrize("overlap", [0, 3])
def test_an_impossible_overlap_is_refused(overlap):
    with pytest.raises(ValueError, match=f"overlap is {overlap} frames; it must be 1 to 2"):
        cross_fade(jnp.ones((1, 2)), jnp.ones((1, 9)), overlap)


def test_pixels_become_uint8_rounded_and_clipped():
    pixels = jnp.array([-1.5, -1, -0.999, 0, 0.001, 0.9999, 1, 7])[None, None, :, None]
    # 0 is 127.5, and halves round to even.
    np.testing.assert_array_equal(to_uint8(pixels)[0, 0, :, 0], [0, 0, 0, 128, 128, 255, 255, 255])
    assert to_uint8(pixels).dtype == jnp.uint8


def test_the_middle_of_larger_frames_is_cut_out():
    frames = jnp.asarray(np.linspace(-1, 1, 2 * 8 * 11 * 3).reshape(1, 2, 8, 11, 3), jnp.float32)
    whole = np.asarray(to_uint8(frames))
    np.testing.assert_array_equal(to_uint8(frames, 4, 8), whole[:, :, 2:6, 1:9])
    np.testing.assert_array_equal(to_uint8(frames, height=6), whole[:, :, 1:7])
    np.testing.assert_array_equal(to_uint8(frames, 8, 11), whole)
    with pytest.raises(ValueError, match="frames are 8 x 11; 9 x 11 cannot be cut out"):
        to_uint8(frames, 9, 11)
