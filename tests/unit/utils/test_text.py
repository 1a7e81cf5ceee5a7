"""Cleaning of prompts."""

import sys

import pytest

from framepack_jax.utils.text import clean_prompt


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a red sofa", "a red sofa"),
        ("", ""),
        ("  a\n\n red\t sofa\u3000\u00a0", "a red sofa"),
        ("cats &amp;amp; dogs &lt;3", "cats & dogs <3"),
        ("schÃ¶n, naÃ¯ve", "schön, naïve"),
        ("the girl\u2019s \u201cred\u201d ﬁsh", 'the girl\'s "red" fish'),
    ],
)
def test_prompts_are_cleaned(text: str, cleaned: str) -> None:
    assert clean_prompt(text) == cleaned


def test_nothing_is_cleaned_without_ftfy(monkeypatch) -> None:
    """Ids would silently be others."""
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match="ftfy"):
        clean_prompt("a red sofa")
