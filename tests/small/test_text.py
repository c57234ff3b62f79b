"""What the small model's text encoder is taught."""

from __future__ import annotations

import pytest
import torch
from small_kit import recipe_modules


def test_words_count_by_what_they_tell() -> None:
    """Padding and what all captions say count nothing; a word of one caption in four twice one of every other."""
    padding, a, red, blue, green, up, down = range(7)
    captions = [
        [a, red, up, padding],
        [a, blue, up, padding],
        [a, blue, down, padding],
        [a, green, down, down],
    ]
    with recipe_modules("shown", "networks") as modules:
        told = modules["networks"].words_told(torch.tensor(captions), 8, padding)
    assert told.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert not told[:, [padding, a, 7]].any()
    assert told[0, [red, up]].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert told[1, [blue, up]].tolist() == pytest.approx([1 / 2, 1 / 2])
    assert told[3, [green, down]].tolist() == pytest.approx([2 / 3, 1 / 3])


def test_captions_that_are_all_alike_tell_nothing() -> None:
    with recipe_modules("shown", "networks") as modules:
        told = modules["networks"].words_told(torch.tensor([[1, 2], [1, 2]]), 4, 0)
    assert not told.any()
