"""Schedules, plans and lengths, against the released indices in golden/ and the paper's claims."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framepack_jax import packing
from framepack_jax.cli import explain
from framepack_jax.packing import MISSING, ScheduleError, Timeline

VANILLA = "td_f16k4f2k2f1k1_g9"
SCHEDULES = [
    packing.RELEASED_INVERTED,
    packing.RELEASED_F1,
    VANILLA,
    "td_f16k4f2k2f1k1_g9+D",
    "td_f16k4f2k2f1k1_g9+D256",
    "td_f16k4f2k2f1k1_g9_x_f1k1",
    "td_f16k4f2k2f1k1_g9_x_f1k1@planned(4)",
    "f1k1_x_g9_f1k1f2k2f16k4_td@planned(2)",
    "ta_f8k1h4w4f1k1_g3",
    "f1k8f1k16_g1_tc",
]

_number = st.integers(1, 200).map(str)
_kernel = st.one_of(
    st.integers(1, 8).map("k{}".format),
    st.integers(1, 9).map(lambda n: f"k{8 * n}"),
    st.tuples(*[st.integers(1, 12)] * 3).map(lambda n: "k{}h{}w{}".format(*n)),
)
_context = st.lists(st.tuples(_number, _kernel).map(lambda r: f"f{r[0]}{r[1]}"), min_size=1)
_item = st.one_of(
    _context.map("".join), _number.map("g{}".format), st.sampled_from(["x", "td", "ta", "tc"])
)
_schedule = st.tuples(
    st.lists(_item, min_size=1).map("_".join),
    st.one_of(st.sampled_from(["", "+D"]), _number.map("+D{}".format)),
).map("".join)


@pytest.mark.parametrize("text", SCHEDULES)
def test_named_schedules_round_trip(text: str) -> None:
    assert str(packing.parse(text)) == text


@given(_schedule)
def test_every_schedule_of_the_grammar_round_trips(text: str) -> None:
    assert str(packing.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("f1", "'f1'"),
        ("f1k1__g9", "''"),
        ("f0k1_g9", "'f0k1'"),
        ("f1k1h4_g9", "'f1k1h4'"),
        ("g9_td+E", "'+E'"),
        ("g9+D0", "'+D0'"),
        ("f1k1_g9_tx", "'tx'"),
        ("f1k1_g9 ", "'g9 '"),
        ("f٣k1_g9", "'f٣k1'"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, named: str) -> None:
    with pytest.raises(ScheduleError) as error:
        packing.parse(text)
    assert named in str(error.value)


def test_kernels() -> None:
    assert packing.kernel_shape("k1") == (1, 2, 2)
    assert packing.kernel_shape("k2") == (2, 4, 4)
    assert packing.kernel_shape("k4") == (4, 8, 8)
    assert packing.kernel_shape("k8") == (8, 16, 16)
    assert packing.kernel_shape("k1h4w6") == (1, 4, 6)
    assert packing.parse("g9+D").codebook == 128
    assert packing.parse("g9+D16").codebook == 16
    assert packing.parse("g9").codebook is None


@pytest.mark.parametrize(
    ("schedule", "order", "named"),
    [
        ("td_f16k4f2k2f1k1_g9_x_f1k1", "inverted", "inverted"),
        (VANILLA, "planned(3)", "planned(3)"),
        (VANILLA, "planned", "planned(4)"),
        (VANILLA, "inverted", "inverted"),
        (packing.RELEASED_INVERTED, "forward", "forward"),
        (VANILLA, "sideways", "sideways"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(schedule, order, named) -> None:
    with pytest.raises(ScheduleError) as error:
        packing.plan(packing.parse(schedule, order), 2)
    assert named in str(error.value)


def test_default_orders() -> None:
    assert packing.parse(packing.RELEASED_INVERTED).order == "inverted"
    assert packing.parse(packing.RELEASED_F1).order == "forward"
    assert packing.parse(VANILLA).order == "forward"
    assert packing.parse("td_f16k4f2k2f1k1_g9_x_f1k1").order == "endpoint"


def _released(section: packing.Section) -> dict[str, list[int]]:
    """Frame indices under the release's names."""
    by_kernel = {"k1": [], "k2": [], "k4": []}
    for group in section.groups:
        by_kernel[group.kernel] += group.indices
    names = {"clean": "k1", "clean_2x": "k2", "clean_4x": "k4"}
    indices = {name: by_kernel[kernel] for name, kernel in names.items()}
    return {"target": list(section.indices), **indices}


@pytest.mark.golden
def test_sections_equal_the_release(golden) -> None:
    for case in json.loads((golden / "sections.json").read_text()):
        w = case["latent_window_size"]
        n = packing.sections_for(case["seconds"], w, case["fps"])
        assert n == case["sections"]
        paddings = packing.inverted_paddings(n)
        assert paddings == case["inverted_paddings"]
        plan = packing.plan(packing.parse(f"f1k1_x_g{w}_f1k1f2k2f16k4_td"), n)
        ours = [
            {"padding": padding, **_released(section)}
            for padding, section in zip(paddings, plan, strict=True)
        ]
        assert (ours if n <= 12 else ours[:3] + ours[-3:]) == case["inverted"]
        for section in packing.plan(packing.parse(f"f1k1_x_f16k4f2k2f1k1_g{w}"), n):
            assert _released(section) == case["f1"]


@pytest.mark.parametrize("sections", [1, 2, 5, 9])
def test_inverted_reads_what_follows(sections: int) -> None:
    w, end = 3, 1 + 3 * sections
    plan = packing.plan(packing.parse("f1k1_x_g3_f1k1f2k2f16k4_td"), sections)
    assert [p for s in reversed(plan) for p in s.targets] == list(range(1, end))
    for section in plan:
        four, two, start, near = section.groups
        assert start.reads == (0,)
        after = section.targets[-1] + 1
        expected = [p if p < end else MISSING for p in range(after, after + 19)]
        assert list(near.reads + two.reads + four.reads) == expected
    assert plan[0].decode == ((0, end) if sections == 1 else (end - w, end),)
    assert plan[-1].decode == ((0, min(1 + 2 * w, end)),)


@pytest.mark.parametrize("schedule", ["f1k1_x_f16k4f2k2f1k1_g3", "td_f16k4f2k2f1k1_g3"])
def test_forward_reads_what_came_before(schedule: str) -> None:
    plan = packing.plan(packing.parse(schedule), 8)
    assert [p for s in plan for p in s.targets] == list(range(1, 25))
    anchored = schedule.startswith("f1k1")
    for section in plan:
        groups = [g for g in section.groups if not (anchored and g.indices == (0,))]
        before = [p for g in groups for p in g.reads]
        first = section.targets[0]
        assert before == [p if p >= 0 else MISSING for p in range(first - 19, first)]
        indices = [i for g in groups for i in g.indices] + list(section.indices)
        assert indices == list(range(anchored, anchored + 22))
    assert plan[0].decode == ((0, 4),)
    assert plan[1].decode == ((1, 7),)


def test_context_length_does_not_grow() -> None:
    """Groups, shapes and token counts are those of the first section, for any length."""
    for schedule in (packing.RELEASED_INVERTED, packing.RELEASED_F1, VANILLA):
        parsed = packing.parse(schedule)
        shapes = {
            tuple((g.kernel, len(g.reads)) for g in section.groups)
            for n in (1, 3, 120)
            for section in packing.plan(parsed, n)
        }
        assert len(shapes) == 1
    tokens = [
        t for _, t in packing.context_tokens(packing.parse(packing.RELEASED_INVERTED), 76, 80)
    ]
    assert tokens == [1520, 1520, 380, 400]
    assert packing.target_tokens(packing.parse(packing.RELEASED_INVERTED), 76, 80) == 13680


def test_geometric_schedule_stays_under_the_bound() -> None:
    """History that halves with age never passes the paper's limit, for endless history."""
    frame = packing.group_tokens(1, "k1", 64, 64)
    halving = ["f1k1", "f1k1h2w4", "f1k1h4w4", "f1k1h4w8", "f1k1h8w8"]
    for n in range(1, 6):
        schedule = f"g9_{''.join(halving[:n])}_td"
        history = sum(t for _, t in packing.context_tokens(packing.parse(schedule), 64, 64))
        assert 9 + history / frame < packing.frame_bound(9)


def test_timeline() -> None:
    timeline = Timeline(4, (2, 2, 1), batch=2)
    timeline.write([2, 0], np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2, 1))
    assert timeline.known.tolist() == [True, False, True, False]
    read = timeline.read([0, MISSING, 2])
    np.testing.assert_array_equal(read[:, 0], timeline.latents[:, 0])
    assert not read[:, 1].any()
    assert read[1, 2].ravel().tolist() == [8, 9, 10, 11]
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        timeline.read([1, 2, 3])


def test_context_is_read_per_sample() -> None:
    timeline = Timeline(7, (2, 2, 1), batch=2)
    timeline.write(range(7), np.arange(56, dtype=np.float32).reshape(2, 7, 2, 2, 1))
    last = packing.plan(packing.parse("f1k1_x_g3_f1k1f2k2f16k4_td"), 2)[-1]
    context = packing.read_context(last, timeline)
    assert context.kernels == ("k4", "k2", "k1", "k1")
    np.testing.assert_array_equal(context.latents[2], timeline.latents[:, :1])
    np.testing.assert_array_equal(context.latents[1], timeline.latents[:, 5:7])
    assert not context.latents[0].any()
    assert [i.shape for i in context.indices] == [(2, 16), (2, 2), (2, 1), (2, 1)]
    assert context.target_indices.tolist() == [[1, 2, 3]] * 2


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e308])
def test_impossible_durations(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        packing.sections_for(seconds, 9)


def test_explain_draws_the_context(capsys) -> None:
    explain.main([packing.RELEASED_INVERTED, "--height", "608", "--width", "640"])
    text = capsys.readouterr().out
    assert "17500 tokens" in text
    for words in ("f16k4", "4x8x8", "400", "12.50%", "makes 19..27", "k4: 22..27, -"):
        assert words in text
    explain.main(["td_f16k4f2k2f1k1_g9_x_f1k1", "--sections", "4"])
    text = capsys.readouterr().out
    for words in ("31180 in the first pass", "makes 1..9, 28..36", "k4: -", "k1: 9  k1: 28"):
        assert words in text
    with pytest.raises(SystemExit, match="'f1q'"):
        explain.main(["f1q"])


@pytest.mark.parametrize(("seconds", "position"), [(0, 0), (0.04, 1), (4 / 30, 1), (5 / 30, 2)])
def test_position_of_a_time(seconds: float, position: int) -> None:
    """The first latent is one frame, every other four: frames 1 .. 4 are latent 1."""
    assert packing.position_at(seconds, fps=30) == position


@pytest.mark.parametrize("seconds", [-0.1, float("nan"), float("inf")])
def test_times_that_cannot_be(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"time {seconds}"):
        packing.position_at(seconds)


def test_what_is_known_of_a_target() -> None:
    section = packing.plan(packing.parse("f1k1_x_f16k4f2k2f1k1_g3"), 1)[0]
    timeline = Timeline(4, (1, 1, 2))
    timeline.write([0, 2], np.full((1, 2, 1, 1, 2), 7.0))
    latents, known = packing.read_target(section, timeline)
    assert known.tolist() == [False, True, False]
    assert latents[0, :, 0, 0, 0].tolist() == [0, 7, 0]


@pytest.mark.parametrize("order", ["inverted", "forward"])
@pytest.mark.parametrize("before", [1, 3, 9, 12, 40])
@pytest.mark.parametrize("sections", [1, 2, 5])
def test_sections_after_a_known_beginning(order: str, before: int, sections: int) -> None:
    """Every position once, nothing read that is not there yet, clips that meet."""
    schedule = packing.RELEASED_INVERTED if order == "inverted" else packing.RELEASED_F1
    after = int(order == "inverted")
    plan = packing.plan(packing.parse(schedule), sections, before=before, after=after)
    end = before + 9 * sections + after
    assert packing.length(plan) == end
    there = set(range(before)) | set(range(end - after, end))
    for section in plan:
        for group in section.groups:
            assert set(group.reads) - {MISSING} <= there
        assert not there & set(section.targets)
        there |= set(section.targets)
        assert all(set(range(*clip)) <= there for clip in section.decode)
    assert there == set(range(end))
    clips = sorted(packing.frames_of(*clip) for section in plan for clip in section.decode)
    assert clips[0][0] == 4 * max(0, before - 9) and clips[-1][1] == 4 * (end - 1) + 1
    # Cross-faded over 4 w - 3 frames, as in the release.
    assert all(a[1] - b[0] == 33 for a, b in itertools.pairwise(clips))


def test_an_end_image_needs_an_order_that_reads_it() -> None:
    with pytest.raises(ScheduleError, match="'forward'"):
        packing.plan(packing.parse(packing.RELEASED_F1), 1, after=1)
    with pytest.raises(ScheduleError, match="reads no frames after its own"):
        packing.plan(packing.parse(packing.RELEASED_F1), 1, guide=True)


def test_a_guide_is_read_by_the_section_made_first_and_is_no_frame() -> None:
    with_guide = packing.plan(packing.parse("f1k1_x_g9_f1k1f2k2f16k4_td"), 3, guide=True)
    without = packing.plan(packing.parse("f1k1_x_g9_f1k1f2k2f16k4_td"), 3)
    assert with_guide[1:] == without[1:] and packing.length(with_guide) == 1 + 3 * 9
    first, plain = with_guide[0], without[0]
    assert (first.targets, first.decode) == (plain.targets, plain.decode)
    reads = [p for group in first.groups for p in group.reads if p != MISSING]
    assert reads == [0, 28] and [g.indices for g in first.groups] == [
        g.indices for g in plain.groups
    ]
    with pytest.raises(ScheduleError, match="0 frames are known, 1 are needed"):
        packing.plan(packing.parse(packing.RELEASED_INVERTED), 1, before=0)
    with pytest.raises(ScheduleError, match="10001"):
        packing.plan(packing.parse(packing.RELEASED_INVERTED), 10001)


@pytest.mark.parametrize(
    "schedule",
    [packing.RELEASED_INVERTED, packing.RELEASED_F1, VANILLA, "tc_f2k1_g2", "ta_f2k1_g2"],
)
def test_without_history_the_first_frame_alone_is_read(schedule: str) -> None:
    """As anchor, and as a frame of the history; nothing else of the section changes."""
    parsed = packing.parse(schedule)
    for section in packing.plan(parsed, 5):
        blank = packing.without_history(section, parsed)
        for before, after in zip(section.groups, blank.groups, strict=True):
            tail = packing.tail_of(before.kernel)
            assert after.reads == tuple(0 if r == 0 and not tail else MISSING for r in before.reads)
            assert (after.kernel, after.indices) == (before.kernel, before.indices)
        assert (blank.targets, blank.indices) == (section.targets, section.indices)
        ones = Timeline.of(np.ones((1, 60, 4, 4, 1), np.float32))
        context = packing.read_context(blank, ones)
        read = sum(float(latents.sum()) for latents in context.latents)
        assert read == 16 * sum(group.reads.count(0) for group in blank.groups)
