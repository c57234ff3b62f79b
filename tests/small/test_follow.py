"""Reading back what a video shows: right on the made-up world itself, and not by chance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from small_kit import recipe_modules

from cogcache.small import render


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    with recipe_modules("windows", "clips", "shown", "networks", "pictures", "make", "follow") as modules:
        yield modules


@pytest.fixture
def follow(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["follow"]


def test_scenes_to_measure_by_were_not_learned_from(scripts: dict[str, ModuleType]) -> None:
    plan = scripts["make"].FULL
    learned, _ = scripts["clips"].choose_scenes(plan["clips"], plan["held_out"])
    chosen = scripts["follow"].unseen(40)
    assert len({scene.caption for scene in chosen}) == 40
    assert not {scene.caption for scene in chosen} & {scene.caption for scene in learned}


def test_every_word_is_read_back(follow: ModuleType) -> None:
    scenes = follow.unseen(4)
    noise = np.random.default_rng(0).normal(0, 25, (17, 96, 144, 3))
    videos = [np.clip(render(scene, 17, 96, 144) + noise, 0, 255).astype(np.uint8) for scene in scenes]
    assert follow.shares(scenes, videos) == dict.fromkeys(follow.WORDS, 1.0)


@pytest.mark.parametrize("word", ["shape", "colour", "size", "motion", "background"])
def test_a_word_that_was_not_followed_is_noticed(follow: ModuleType, word: str) -> None:
    scene = follow.unseen(1)[0]
    other = next(value for value in follow.WORDS[word] if value != getattr(scene, word))
    video = render(replace(scene, **{word: other}), 17, 96, 144)
    assert follow.nearest(scene, video, word) == other
