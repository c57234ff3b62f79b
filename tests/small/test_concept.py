"""Clips of the new concept: what is measured by is never trained on, and is drawn the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cogcache.mp4 import read_mp4
from cogcache.small import NOVEL, render
from cogcache.small.concept import choose_concept, write_concept


def test_who_is_who() -> None:
    concept = choose_concept(60, 30, 5)
    assert [len(g) for g in (concept.new, concept.known, concept.new_held_out, concept.known_held_out)] == [
        60,
        30,
        5,
        5,
    ]
    assert {(s.shape, s.colour) for s in concept.new + concept.new_held_out} == {NOVEL}
    assert not any(
        s.shape == NOVEL[0] or s.colour == NOVEL[1] for s in concept.known + concept.known_held_out
    )
    trained = {scene.caption for scene in concept.new + concept.known}
    assert not trained & {scene.caption for scene in concept.new_held_out + concept.known_held_out}
    seeds = [scene.seed for scene in concept.sources.values()]
    assert len(set(seeds)) == len(seeds) == 100
    assert choose_concept(60, 30, 5) == concept != choose_concept(60, 30, 5, seed=1)


def test_files(tmp_path: Path) -> None:
    concept = choose_concept(2, 1, 1)
    write_concept(tmp_path, concept)
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == sorted(concept.sources)
    assert (tmp_path / "held-out.txt").read_text().split() == ["held-out-new-00.mp4", "held-out-known-00.mp4"]
    frames, fps = read_mp4(tmp_path / "new-01.mp4")
    assert fps == 8
    seen = render(concept.new[1], 17, 96, 144)
    assert np.abs(frames.astype(float) - seen).mean() < 4
    assert concept.new[1].caption in (tmp_path / "metadata.jsonl").read_text()


@pytest.mark.parametrize("held_out", [1, 12])
def test_held_out_clips_are_listed(held_out: int) -> None:
    assert len(choose_concept(4, 4, held_out).held_out()) == 2 * held_out
