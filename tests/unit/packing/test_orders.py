"""Orders of sections: written tables, and what every plan promises."""

import itertools

import pytest

from framepack_jax import packing
from framepack_jax.generation.crossfade import Splicer
from framepack_jax.packing import MISSING, ScheduleError, Section

M = MISSING
ENDPOINT = "td_f16k4f2k2f1k1_g9_x_f1k1"
SYMMETRIC = "f1k1f2k2_x_f16k4f2k2f1k1_g9"
ORDERS = [
    packing.RELEASED_INVERTED,
    packing.RELEASED_F1,
    SYMMETRIC,
    ENDPOINT,
    "f1k1f2k2_x_f16k4f2k2f1k1_g9_x_f2k1",
    *(f"{packing.RELEASED_INVERTED}@planned({m})" for m in (1, 2, 3)),
    *(f"{ENDPOINT}@planned({m})" for m in (1, 2, 4)),
    "f12k1f2k2_x_f16k4f1k1_g9_x_f12k1@planned(3)",
    "f12k1_x_g9_f1k1f16k4_td@planned(3)",
]


def table(section: Section) -> list:
    """Targets and their indices, then (kernel, reads, indices) of each group, then clips."""
    groups = [(group.kernel, group.reads, group.indices) for group in section.groups]
    return [section.targets, section.indices, *groups, section.decode]


def test_an_endpoint_order_makes_both_ends_then_the_gap() -> None:
    plan = packing.plan(packing.parse("td_f2k2f1k1_g2_x_f1k1"), 4)
    assert [table(section) for section in plan] == [
        [
            (1, 2, 7, 8), (3, 4, 9, 10),
            ("k2", (M, M), (0, 1)), ("k1", (0,), (2,)), ("k1", (M,), (11,)),
            ((0, 3), (7, 9)),
        ],
        [
            (3, 4), (3, 4),
            ("k2", (0, 1), (0, 1)), ("k1", (2,), (2,)), ("k1", (7,), (7,)),
            ((1, 5),),
        ],
        [
            (5, 6), (3, 4),
            ("k2", (2, 3), (0, 1)), ("k1", (4,), (2,)), ("k1", (7,), (5,)),
            ((3, 7), (5, 9)),
        ],
    ]  # fmt: skip


def test_an_endpoint_order_of_few_sections() -> None:
    one = packing.plan(packing.parse("td_f1k1_g2_x_f1k1"), 1)
    two = packing.plan(packing.parse("td_f1k1_g2_x_f1k1"), 2)
    assert [table(section) for section in one] == [
        [(1, 2), (1, 2), ("k1", (0,), (0,)), ("k1", (M,), (3,)), ((0, 3),)]
    ]
    assert [table(section) for section in two] == [
        [(1, 2, 3, 4), (1, 2, 3, 4), ("k1", (0,), (0,)), ("k1", (M,), (5,)), ((0, 3), (1, 5))]
    ]


def test_the_gap_to_the_ending_is_clipped_as_the_release_clips_paddings() -> None:
    """The first pass knows the true distance; later ones say at most three windows."""
    first, *others = packing.plan(packing.parse(ENDPOINT), 8)
    assert first.indices == (*range(19, 28), *range(19 + 7 * 9, 19 + 8 * 9))
    gaps = [(section.groups[-1].indices[0] - 28) / 9 for section in others]
    assert gaps == [3, 2, 2, 2, 1, 0]


def test_an_end_image_is_the_ending_of_the_first_pass() -> None:
    guided = packing.plan(packing.parse("td_f1k1_g2_x_f1k1"), 3, guide=True)
    assert guided[0].groups[-1].reads == (7,) and guided[0].groups[-1].indices == (7,)
    assert guided[1].groups[-1].reads == (5,) and packing.length(guided) == 7
    still = packing.plan(packing.parse("td_f1k1_g2_x_f1k1"), 3, after=1)
    assert still[0].groups[-1].reads == (7,) and still[0].decode == ((0, 3), (5, 8))


def test_planned_endpoints_move_the_anchor_of_inverted_weights() -> None:
    plan = packing.plan(packing.parse("f1k1_x_g2_f1k1f2k2_td@planned(2)"), 5)
    assert [table(section) for section in plan] == [
        [(3, 4), (3, 4), ("k2", (M, M), (6, 7)), ("k1", (0,), (0,)), ("k1", (M,), (5,)), ()],
        [(7, 8), (3, 4), ("k2", (M, M), (6, 7)), ("k1", (4,), (0,)), ("k1", (M,), (5,)), ()],
        [
            (9, 10), (1, 2), ("k2", (M, M), (4, 5)), ("k1", (8,), (0,)), ("k1", (M,), (3,)),
            ((7, 11),),
        ],
        [(1, 2), (1, 2), ("k2", (4, M), (4, 5)), ("k1", (0,), (0,)), ("k1", (3,), (3,)), ((0, 5),)],
        [
            (5, 6), (1, 2), ("k2", (8, M), (4, 5)), ("k1", (4,), (0,)), ("k1", (7,), (3,)),
            ((3, 7), (5, 9)),
        ],
    ]  # fmt: skip


def test_a_part_of_a_planned_order_is_the_released_plan_of_its_length() -> None:
    """So the released weights see nothing new: only the anchor and the positions move."""
    plan = packing.plan(packing.parse(f"{packing.RELEASED_INVERTED}@planned(3)"), 6)
    released = packing.plan(packing.parse(packing.RELEASED_INVERTED), 3)

    def moved(section: Section, by: int) -> list:
        groups = [
            (g.kernel, tuple(p if p == M else p + by for p in g.reads), g.indices)
            for g in section.groups
        ]
        return [tuple(p + by for p in section.targets), section.indices, *groups]

    for part, numbers in enumerate(((0, 2, 3), (1, 4, 5))):
        made = [table(plan[number])[:-1] for number in numbers]
        assert made == [moved(section, 27 * part) for section in released]


def test_planned_endpoints_of_a_schedule_with_history_before_the_section() -> None:
    plan = packing.plan(packing.parse("td_f2k2f1k1_g2_x_f1k1@planned(3)"), 4)
    assert [table(section)[:-1] for section in plan] == [
        [(5, 6), (7, 8), ("k2", (M, M), (0, 1)), ("k1", (0,), (2,)), ("k1", (M,), (9,))],
        [(7, 8), (3, 4), ("k2", (M, 5), (0, 1)), ("k1", (6,), (2,)), ("k1", (M,), (5,))],
        [(1, 2), (3, 4), ("k2", (M, M), (0, 1)), ("k1", (0,), (2,)), ("k1", (5,), (7,))],
        [(3, 4), (3, 4), ("k2", (0, 1), (0, 1)), ("k1", (2,), (2,)), ("k1", (5,), (5,))],
    ]
    assert [section.decode for section in plan] == [(), ((5, 9),), ((0, 3),), ((1, 5), (3, 7))]


def test_planned_endpoints_of_every_section_are_the_order_of_time() -> None:
    def made(order: str) -> list:
        return packing.plan(packing.parse(f"td_f16k4f1k1_g9_x_f1k1@{order}"), 5)

    forward = packing.plan(packing.parse("td_f16k4f1k1_g9"), 5)
    for ours, theirs in zip(made("planned(1)"), forward, strict=True):
        ending = next(g for g in ours.groups if g.kernel == "k1" and g.indices > ours.indices)
        assert set(ending.reads) == {M}
        assert [g for g in ours.groups if g is not ending] == list(theirs.groups)
        assert (ours.targets, ours.decode) == (theirs.targets, theirs.decode)


def test_an_anchor_of_several_frames_is_missing_until_it_is_made() -> None:
    first, second = packing.plan(packing.parse("f1k1f2k2_x_f2k2f1k1_g2"), 2)
    assert table(first) == [
        (1, 2), (6, 7),
        ("k2", (M, M), (1, 2)), ("k2", (M, M), (3, 4)), ("k1", (0,), (0,)), ("k1", (0,), (5,)),
        ((0, 3),),
    ]  # fmt: skip
    assert table(second) == [
        (3, 4), (6, 7),
        ("k2", (1, 2), (1, 2)), ("k2", (0, 1), (3, 4)), ("k1", (0,), (0,)), ("k1", (2,), (5,)),
        ((1, 5),),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ORDERS)
def test_every_position_is_made_once_and_reads_only_what_is_made(text: str) -> None:
    schedule = packing.parse(text)
    ends = [(0, False), (1, False), (0, True)] if schedule.reads_ahead else [(0, False)]
    for sections, before, (after, guide) in itertools.product((1, 2, 3, 5, 20), (1, 3, 12), ends):
        check_plan(
            packing.plan(schedule, sections, before=before, after=after, guide=guide),
            before, before + 9 * sections + after, after, guide,
        )  # fmt: skip


def check_plan(plan: list[Section], before: int, stop: int, after: int, guide: bool) -> None:
    assert packing.length(plan) == stop
    made = {*range(before), *range(stop - after, stop)}
    for section in plan:
        there = made | ({stop} if guide else set())
        assert all(set(group.reads) - {MISSING} <= there for group in section.groups)
        assert all(len(group.reads) == len(group.indices) for group in section.groups)
        assert not made & set(section.targets)
        assert len(section.targets) == len(section.indices)
        made |= set(section.targets)
        assert all(set(range(*clip)) <= made for clip in section.decode)
    assert made == set(range(stop))
    clips = [packing.frames_of(*clip) for section in plan for clip in section.decode]
    Splicer(clips)  # at most two cover a frame, none leaves a gap
    clips = sorted(clips)
    assert clips[0][0] == 4 * max(0, before - 9) and clips[-1][1] == 4 * (stop - 1) + 1
    assert all(a[1] - b[0] == 33 for a, b in itertools.pairwise(clips))


@pytest.mark.parametrize("text", ORDERS)
def test_shapes_of_a_pass_do_not_depend_on_the_length(text) -> None:
    schedule = packing.parse(text)
    shapes = {
        (len(s.targets), *((g.kernel, len(g.reads)) for g in s.groups))
        for sections in (1, 2, 3, 7, 120)
        for s in packing.plan(schedule, sections)
    }
    assert {frames for frames, *_ in shapes} == set(packing.pass_frames(schedule))
    assert len(shapes) == len(packing.pass_frames(schedule))


def test_an_order_is_a_part_of_the_text() -> None:
    schedule = packing.parse(f"{packing.RELEASED_INVERTED}@planned(4)")
    assert (schedule.order, schedule.stride) == ("planned(4)", 4)
    assert packing.parse(str(schedule)) == packing.parse(str(schedule), "planned(4)") == schedule
    assert str(schedule.with_window(3)) == "f1k1_x_g3_f1k1f2k2f16k4_td@planned(4)"
    # The usual order of a form is not spelled.
    assert str(packing.parse(f"{ENDPOINT}@endpoint")) == ENDPOINT


@pytest.mark.parametrize(
    ("text", "order", "named"),
    [
        (f"{ENDPOINT}@", None, "order ''"),
        (f"{ENDPOINT}@planned(0)", None, r"planned\(0\)"),
        (f"{ENDPOINT}@planned", None, r"planned\(4\)"),
        (f"{ENDPOINT}@planned(2)", "planned(3)", r"another order than 'planned\(3\)'"),
        ("td_f1k1_g9@planned(2)", None, f"expected the form of .* or {ENDPOINT}"),
        ("f1k1_g9_f1k1", None, f"'endpoint': expected the form of {ENDPOINT}"),
    ],
)
def test_an_order_that_cannot_be_sampled_is_named(text, order, named) -> None:
    with pytest.raises(ScheduleError, match=named):
        packing.plan(packing.parse(text, order), 2)
