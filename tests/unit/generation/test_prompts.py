"""Prompts by time: how they are written, and their shares."""

import re

import pytest

from framepack_jax.generation.prompts import prompt_shares, timed_prompts


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("she waves", [(0.0, "she waves")]),
        ("", [(0.0, "")]),
        ("0s: she waves 4.5s: she bows", [(0.0, "she waves"), (4.5, "she bows")]),
        (" 0s:she waves\n12 s:  she\nbows", [(0.0, "she waves"), (12.0, "she\nbows")]),
        ("0s: 2s: she bows", [(0.0, ""), (2.0, "she bows")]),
        ("0s: she waves (slowly) 2s: she bows", [(0.0, "she waves (slowly)"), (2.0, "she bows")]),
    ],
)
def test_prompts_with_times(text, prompts) -> None:
    assert timed_prompts(text) == prompts


@pytest.mark.parametrize(
    "text",
    [
        "[0s: she waves] [2s: she bows]", "[0s-2s: she waves] [2s-4s: she bows]",
        "(0s: she waves) (2s: she bows)", "【0秒：she waves】【2秒：she bows】",
        "[0s] she waves [2s] she bows", "[0:00] she waves\n[0:02] she bows",
        "0s:she waves;2s:she bows", "0s: she waves,2s: she bows", "0s: she waves | 2.0s: she bows",
        "0s: she waves 2,0s: she bows", "0S: she waves 2S: she bows",
        "0 sec: she waves 2 secs: she bows", "0 seconds: she waves 2 seconds: she bows",
        "0-2s: she waves 2-4s: she bows", "0s - 2s: she waves 2s – 4s: she bows",
        "0:00: she waves 0:02: she bows", "0:00:00: she waves 0:00:02: she bows",
        "0s： she waves 2s： she bows", "０ｓ：she waves　２ｓ：she bows",
        "0s - she waves 2s - she bows",
    ],
)  # fmt: skip
def test_ways_to_write_times(text: str, recwarn) -> None:
    assert timed_prompts(text) == [(0.0, "she waves"), (2.0, "she bows")]
    assert not recwarn


@pytest.mark.parametrize(
    "text",
    [
        "it lasts 4s then stops", "a 30s sitcom", "a 5s-long exposure, 16:9", "(she waves:1.2), 8k",
        "at 10:30 in the morning", "in the 1980s, a car", "[a red car] (a road)", "a 3 s clip",
    ],
)  # fmt: skip
def test_texts_that_mention_times_are_one_prompt(text: str, recwarn) -> None:
    assert timed_prompts(text) == [(0.0, text)]
    assert not recwarn


@pytest.mark.parametrize(
    ("text", "named", "prompts"),
    [
        ("it waves 4s: it bows", "'4s:'", 1),
        ("a 5s: exposure", "'5s:'", 1),
        ("cinematic [0s: a] [2s: b]", "'0s:'", 1),
        ("she waves, at 2s she bows", "'at 2s'", 1),
        ("she waves (2s) she bows", "'(2s)'", 1),
        ("0s she waves 2s she bows", "'0s'", 1),
        ("0:00 she waves 0:02 she bows", "'0:00'", 1),
        ("00:00:00 she waves", "'00:00:00'", 1),
        ("0s=waves 2s=bows", "'0s='", 1),
        ("0s: she waves, at 2 seconds she bows 3s: she sits", "'at 2 seconds'", 2),
        ("0s: she waves 1m: she bows", "'1m:'", 1),
        ("0s: she waves -2s: she bows", "'-2s:'", 1),
    ],
)
def test_a_time_that_is_taken_as_text_is_told(text: str, named: str, prompts: int) -> None:
    with pytest.warns(UserWarning, match=f"{re.escape(named)} in the prompt is taken as text"):
        assert len(timed_prompts(text)) == prompts


@pytest.mark.parametrize(("text", "following"), [("0s-2s: a 3s: b", 3), ("0s-3s: a 2s: b", 2)])
def test_times_that_leave_gaps_or_overlap_are_told(text: str, following: int) -> None:
    with pytest.warns(UserWarning, match=f"from {following}s: each lasts until the next"):
        assert timed_prompts(text) == [(0.0, "a"), (following, "b")]


@pytest.mark.parametrize("text", ["[0s: a] [2s: b", "[0s: a [2s: b]", "[0s: a] and [2s: b]"])
def test_brackets_of_times_are_closed(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected ']' right before the next time or the end"):
        timed_prompts(text)


def test_a_prompt_ends_after_it_begins() -> None:
    with pytest.raises(ValueError, match="2s-1s: it ends before it begins"):
        timed_prompts("0s-2s: a 2s-1s: b")


@pytest.mark.parametrize(
    "text", ["1s: late", "0s: a 3s: b 2s: c", "0s: a 0s: b", "0s: the 1980s: x 3s: y"]
)
def test_prompt_times_begin_at_0_and_rise(text: str) -> None:
    with pytest.raises(ValueError, match="must begin with 0s and rise"):
        timed_prompts(text)


@pytest.mark.parametrize(
    ("at", "span", "shares"),
    [
        (1.0, 0, [1, 0, 0]),
        (4.0, 0, [0, 1, 0]),
        (3.5, 2, [0.75, 0.25, 0]),
        (4.0, 2, [0.5, 0.5, 0]),
        (99, 2, [0, 0, 1]),
        # Blends may overlap: the one at 5 s takes half of what the one at 4 s left.
        (5.0, 4, [0.125, 0.375, 0.5]),
    ],
)
def test_shares_of_prompts(at: float, span: float, shares: list[float]) -> None:
    assert prompt_shares([0, 4, 5], at, span) == pytest.approx(shares)


@pytest.mark.parametrize("text", ["12:30 - a street at noon", "3:15: afternoon", "5s - a dog runs"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_times_of_day_begin_no_prompts_by_time(text) -> None:
    assert timed_prompts(text) == [(0.0, text)]


def test_full_stops_between_brackets_are_left_out() -> None:
    assert timed_prompts("[0s: a]. [2s: b].") == [(0.0, "a"), (2.0, "b")]
