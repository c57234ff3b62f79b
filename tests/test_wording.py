"""Plurals and excerpts in messages."""

import pytest

from cogcache.wording import counted, where_they_differ


@pytest.mark.parametrize(
    ("count", "words", "expected"),
    [
        (0, ("clip",), "0 clips"),
        (1, ("clip",), "1 clip"),
        (2, ("clip",), "2 clips"),
        (1, ("entry", "entries"), "1 entry"),
        (0, ("entry", "entries"), "0 entries"),
    ],
)
def test_plurals(count: int, words: tuple[str, ...], expected: str) -> None:
    assert counted(count, *words) == expected


def test_short_texts_are_whole() -> None:
    assert where_they_differ("a bird", "a round bird") == ("'a bird'", "'a round bird'")


def test_a_late_difference_is_shown() -> None:
    was, now = where_they_differ("a" * 200 + " bird", "a" * 200 + " rabbit" + "z" * 100)
    assert was == "...'" + "a" * 19 + " bird'"
    assert now.startswith("...'" + "a" * 19 + " rabbit")
    assert now.endswith("'...")


def test_a_text_that_only_grew_shows_its_end() -> None:
    was, now = where_they_differ("a" * 200, "a" * 200 + " bird")
    assert (was, now) == ("...'" + "a" * 20 + "'", "...'" + "a" * 20 + " bird'")
