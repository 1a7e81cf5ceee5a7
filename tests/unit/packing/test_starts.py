"""Plans that start with nothing known, with an anchor apart, or without any context."""

import pytest

from framepack_jax import packing
from framepack_jax.packing import MISSING, ScheduleError

HELIOS = packing.parse("f1k1_x_f16k4f2k2f1k1_g9")


def reads(section: packing.Section) -> dict[tuple[str, int], tuple[int, ...]]:
    """The positions that each group reads, by its kernel and first index."""
    return {(group.kernel, group.indices[0]): group.reads for group in section.groups}


def test_an_empty_start_reads_nothing_and_gives_the_anchor_of_all_others() -> None:
    first, second, third = packing.plan(HELIOS, 3, before=0, alone=True)
    assert all(set(group.reads) == {MISSING} for group in first.groups)
    assert first.targets == tuple(range(9)) and first.decode == ((0, 9),)
    assert reads(second) == {
        ("k1", 0): (0,),
        ("k1", 19): (8,),
        ("k2", 17): (6, 7),
        ("k4", 1): (*[MISSING] * 10, *range(6)),
    }
    assert reads(third)["k1", 0] == (0,) and reads(third)["k4", 1] == (MISSING, *range(15))
    assert third.decode == ((18, 27),) and third.indices == tuple(range(20, 29))


def test_an_anchor_apart_is_no_history() -> None:
    first, second = packing.plan(HELIOS, 2, before=2, apart=True, alone=True)
    assert reads(first) == {
        ("k1", 0): (0,),
        ("k1", 19): (1,),
        ("k2", 17): (MISSING, MISSING),
        ("k4", 1): (MISSING,) * 16,
    }
    assert first.targets == tuple(range(2, 11))
    assert reads(second)["k4", 1] == (*[MISSING] * 9, *range(1, 8))


def test_without_context_there_is_one_section() -> None:
    [section] = packing.plan(packing.parse("g21"), 1)
    assert section.targets == section.indices == tuple(range(21))
    assert section.groups == () and packing.start_frames(packing.parse("g21")) == 0
    with pytest.raises(ScheduleError, match=r"g21 reads no context.*2 sections were asked for"):
        packing.plan(packing.parse("g21"), 2)


def test_an_inverted_order_has_neither() -> None:
    inverted = packing.parse("f1k1_x_g9_f1k1f2k2f16k4_td")
    for options in ({"apart": True}, {"alone": True}):
        with pytest.raises(ScheduleError, match="only sections in forward order"):
            packing.plan(inverted, 2, **options)
    with pytest.raises(ScheduleError, match="0 frames are known, 1 are needed"):
        packing.plan(inverted, 2, before=0)


@pytest.mark.parametrize(
    ("text", "order", "form"),
    [
        ("f1k1_g3_f1k1", "inverted", r"form of f1k1_x_g9_f1k1f2k2f16k4_td$"),
        ("f1k1_g3", "forward", r"form of f1k1_x_f16k4f2k2f1k1_g9 or td_f16k4f2k2f1k1_g9$"),
    ],
)
def test_a_schedule_of_another_form_is_answered_with_that_of_its_order(text, order, form) -> None:
    with pytest.raises(ScheduleError, match=form):
        packing.plan(packing.parse(text, order), 1)
