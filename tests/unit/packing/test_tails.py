"""Tails: the frames beyond a schedule, in one frame or pooled."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax import packing
from framepack_jax.cli import explain
from framepack_jax.packing import MISSING, TAIL_FRAMES, ScheduleError, Timeline

M = MISSING
TAILS = [
    "t{}_f2k2f1k1_g2",
    "f1k1_x_t{}_f2k2f1k1_g2",
    "f1k1_x_g2_f1k1f2k2_t{}",
    "f1k1_x_g2_f1k1f2k2_t{}@planned(4)",
    "t{}_f2k2f1k1_g2_x_f1k1",
    "t{}_f2k2f1k1_g2_x_f1k1@planned(3)",
]


def tails(text: str, sections: int) -> list[packing.Group]:
    """The tail of each pass, the first group of all."""
    plan = packing.plan(packing.parse(text), sections)
    assert all([packing.tail_of(g.kernel) for g in s.groups].count("") >= 2 for s in plan)
    return [section.groups[0] for section in plan]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "tc_f2k2f1k1_g2",
            [((M,), (-1,)), ((M,), (-1,)), ((0, 1), (-2, -1)), ((0, 1, 2, 3), (-4, -3, -2, -1))],
        ),
        (
            "f1k1_x_g2_f1k1f2k2_tc",
            [((M,), (12,)), ((M,), (10,)), ((8,), (8,)), ((6, 7, 8), (6, 7, 8))],
        ),
    ],
)
def test_a_compressed_tail_reads_all_frames_beyond_the_history(text, expected) -> None:
    found = tails(text, 4)
    assert [(group.reads, group.indices) for group in found] == expected
    assert {group.kernel for group in found} == {"tc_k2"}


def test_an_appended_tail_has_places_for_frames_to_come() -> None:
    for text, reads, last in (
        ("ta_f2k2f1k1_g2", [(), (), (0, 1), (0, 1, 2, 3)], [-1] * 4),
        ("f1k1_x_g2_f1k1f2k2_ta", [(), (), (8,), (6, 7, 8)], [11, 9, 8, 8]),
    ):
        found = tails(text, 4)
        for group, expected, index in zip(found, reads, last, strict=True):
            missing = TAIL_FRAMES - len(expected)
            assert group.reads == (M,) * missing + expected
            assert group.indices == tuple(range(index + 1 - TAIL_FRAMES, index + 1))


@pytest.mark.parametrize("backward", [False, True])
def test_the_farthest_frames_of_a_long_tail_are_left_out(backward: bool) -> None:
    text = "f1k1_x_g9_f1k1_ta" if backward else "ta_f1k1_g9"
    plan = packing.plan(packing.parse(text), 120)
    group = plan[-1].groups[0]
    first = 1 + 9 + 1 if backward else plan[-1].targets[0] - 1 - TAIL_FRAMES
    assert group.reads == tuple(range(first, first + TAIL_FRAMES))
    assert group.indices[0] == (11 if backward else -TAIL_FRAMES)


@pytest.mark.parametrize("text", TAILS)
@pytest.mark.parametrize("kind", "ac")
def test_history_and_tail_are_all_that_is_made(text: str, kind: str) -> None:
    """Beside the section of a forward, inverted or endpoint order; a planned endpoint reads that
    before it."""
    schedule = packing.parse(text.format(kind))
    made = {0}
    for section in packing.plan(schedule, 7):
        read = [p for group in section.groups for p in group.reads if p != M]
        assert set(read) <= made
        if schedule.order == "forward":
            assert set(read) == made
        for group in section.groups:
            steps = {i - p for p, i in zip(group.reads, group.indices, strict=True) if p != M}
            assert len(steps) <= 1
        made |= set(section.targets)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compressed_tail_is_the_mean_frame(dtype: str) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 9, 4, 6, 3)).astype(jnp.dtype(dtype))
    plan = packing.plan(packing.parse("tc_f2k2f1k1_g2"), 4)
    context = packing.read_context(plan[-1], Timeline.of(latents))
    expected = latents[:, :4].astype(np.float64).mean(1, keepdims=True).astype(np.float32)
    np.testing.assert_array_equal(context.latents[0], expected)
    assert context.indices[0].tolist() == [[-4, 4]] * 2 and context.masked is None
    first = packing.read_context(plan[0], Timeline.of(latents))
    assert not first.latents[0].any() and first.indices[0].tolist() == [[-1, 1]] * 2


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (64, 40)])
def test_an_appended_tail_is_pooled_and_counts_its_tokens(rows: int, columns: int) -> None:
    """n frames are ceil(n / 2) ceil(ceil(h / 32) / 4) ceil(ceil(w / 32) / 4) tokens of k2."""
    latents = np.random.default_rng(0).standard_normal((1, 9, rows, columns, 1), np.float32)
    schedule = packing.parse("ta_f2k2f1k1_g2")
    most = packing.context_tokens(schedule, rows, columns)[-1][1]
    assert most == packing.group_tokens(TAIL_FRAMES, "ta_k2", rows, columns)
    for section, frames in zip(packing.plan(schedule, 4), (0, 0, 2, 4), strict=True):
        context = packing.read_context(section, Timeline.of(latents))
        tokens = math.prod(-(-n // k) for n, k in ((frames, 2), (-(-rows // 32), 4), (1, 4)))
        assert context.masked.tolist() == [most - tokens] and context.tail_tokens == most
        assert context.latents[0].shape == (1, TAIL_FRAMES, -(-rows // 32), -(-columns // 32), 1)
    assert not context.latents[0][:, :-4].any()
    cell = latents[0, 3, :32, :32]
    repeated = np.pad(cell, [(0, 32 - cell.shape[0]), (0, 32 - cell.shape[1]), (0, 0)], "edge")
    np.testing.assert_allclose(context.latents[0][0, -1, 0, 0], repeated.mean((0, 1)), rtol=1e-4)


def test_a_tail_that_is_not_made_yet_is_named() -> None:
    timeline = Timeline(9, (2, 2, 1))
    timeline.write([0, 2, 3, 4, 5, 6], np.zeros((1, 6, 2, 2, 1), np.float32))
    section = packing.plan(packing.parse("tc_f2k2f1k1_g2"), 4)[-1]
    with pytest.raises(ValueError, match=r"does not know all of positions range\(0, 4\)"):
        packing.read_context(section, timeline)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("f16k4_tc_f1k1_g9", "td_f16k4f2k2f1k1_g9"),
        ("tc_f1k1_x_f16k4_g9", "td_f16k4f2k2f1k1_g9"),
        ("tc_g9", "td_f16k4f2k2f1k1_g9"),
        ("f1k1_x_g9_tc_f1k1", "f1k1_x_g9_f1k1f2k2f16k4_td"),
        ("ta_td_f1k1_g9", "td_f16k4f2k2f1k1_g9"),
    ],
)
def test_a_tail_elsewhere_than_beyond_the_history_is_refused(text: str, form: str) -> None:
    order = "inverted" if "_x_g9" in text else "forward"
    with pytest.raises(ScheduleError, match=f"expected the form of .*{form}"):
        packing.plan(packing.parse(text, order), 2)


def test_explain_counts_a_tail(capsys) -> None:
    explain.main(["ta_f16k4f2k2f1k1_g9", "--sections", "5"])
    text = capsys.readouterr().out
    for words in ("16108 tokens", "ta_k4: -, 0..8  k4: 9..24", "ta_k4: -, 0..17  k4: 18..33"):
        assert words in text
    explain.main(["f1k1_x_g9_f1k1f2k2f16k4_tc", "--sections", "4"])
    assert "tc_k4: 29..36  k4: 13..28" in capsys.readouterr().out
