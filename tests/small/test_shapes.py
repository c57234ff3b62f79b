"""The made-up world shows what its captions say, and where can be read from the pictures."""

from __future__ import annotations

import numpy as np
import pytest

from cogcache.small import NOVEL, Scene, all_scenes, render
from cogcache.small.shapes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, position


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("colour", COLOURS)
def test_the_colour_is_where_the_path_says(colour: str, motion: str) -> None:
    for number, shape in enumerate(SHAPES):
        scene = Scene(shape, colour, list(SIZES)[number % 2], motion, list(BACKGROUNDS)[number % 5], number)
        found = position(render(scene, 9, 96, 144), colour)
        assert np.abs(found - scene.path(9)).max() < 0.02, scene.caption


def test_no_other_colour_is_seen() -> None:
    for shape in SHAPES:
        for background in BACKGROUNDS:
            clip = render(Scene(shape, "red", "large", "moves up", background), 3, 96, 144)
            others = [name for name in COLOURS if name != "red"]
            assert all(np.isnan(position(clip, name, 60.0)).all() for name in others), (shape, background)


def test_motions_go_where_they_say() -> None:
    ways = {
        m: np.diff(Scene("ring", "red", "small", m, "black").path(5)[[0, -1]], axis=0)[0] for m in MOTIONS
    }
    assert ways["moves down"][0] > 0.3 > abs(ways["moves down"][1])
    assert ways["moves up"][0] < -0.3
    assert ways["moves from left to right"][1] > 0.3
    assert ways["moves from right to left"][1] < -0.3
    assert not ways["stays still in the middle"].any()


def test_shapes_and_sizes_differ() -> None:
    pictures = {
        (shape, size): render(Scene(shape, "white", size, "stays still in the middle", "black"), 1, 96, 144)[
            0
        ]
        for shape in SHAPES
        for size in SIZES
    }
    masks = {name: picture[..., 0] > 128 for name, picture in pictures.items()}
    for first in masks:
        for second in masks:
            if first != second:
                together = (masks[first] & masks[second]).sum() / (masks[first] | masks[second]).sum()
                assert together < 0.85, (first, second)
    assert all(masks[shape, "large"].sum() > 2 * masks[shape, "small"].sum() for shape in SHAPES)


def test_what_is_kept_back_is_in_no_other_scene() -> None:
    usual, novel = list(all_scenes()), list(all_scenes(novel=True))
    assert {(scene.shape, scene.colour) for scene in novel} == {NOVEL}
    assert not any(NOVEL[0] == scene.shape or NOVEL[1] == scene.colour for scene in usual)
    assert len({scene.caption for scene in usual}) == len(usual) == 5 * 7 * 2 * 5 * 5
    assert len(novel) == 2 * 5 * 5


def test_the_seed_shifts_the_way_and_nothing_else() -> None:
    scene = Scene("star", "pink", "small", "moves up", "black", 1)
    other = Scene("star", "pink", "small", "moves up", "black", 2)
    assert scene.caption == other.caption == "A small pink star moves up on a black background."
    assert np.array_equal(render(scene, 3, 64, 96), render(scene, 3, 64, 96))
    assert not np.array_equal(scene.path(3)[:, 1], other.path(3)[:, 1])
    assert np.array_equal(scene.path(3)[:, 0], other.path(3)[:, 0])
