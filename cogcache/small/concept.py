"""Clips to teach the small model what it never saw: pink stars, among scenes that it knows already.

The scenes it knows are there so that it forgets nothing (prior preservation).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cogcache.mp4 import write_mp4
from cogcache.small.architecture import FRAMES, HEIGHT, WIDTH
from cogcache.small.shapes import Scene, all_scenes, render

__all__ = ["FPS", "Concept", "choose_concept", "write_concept"]

FPS = 8.0
_FIRST_SEED = 10**6
"""Scenes begin elsewhere than any that the small model was trained on."""


@dataclass(frozen=True)
class Concept:
    """Scenes to train on and to measure by. No caption of the latter is among the former."""

    new: tuple[Scene, ...]
    known: tuple[Scene, ...]
    new_held_out: tuple[Scene, ...]
    known_held_out: tuple[Scene, ...]

    @property
    def sources(self) -> dict[str, Scene]:
        """Every scene by the name of its file, relative to the folder."""
        groups = {"new": self.new, "known": self.known}
        groups |= {"held-out-new": self.new_held_out, "held-out-known": self.known_held_out}
        return {
            f"{name}-{n:02}.mp4": scene for name, group in groups.items() for n, scene in enumerate(group)
        }

    def held_out(self) -> list[str]:
        """Names of what is not trained on, those of the new concept first."""
        return sorted((name for name in self.sources if name.startswith("held-out")), reverse=True)


def choose_concept(new: int = 20, known: int = 20, held_out: int = 6, seed: int = 0) -> Concept:
    """Pink stars and others; the same ones for the same numbers.

    Args:
        new: Clips of pink stars to train on; captions come again, elsewhere in the picture, when there are no more.
        known: Clips of other scenes to train on.
        held_out: Clips of each kind to measure by.
    """
    stars, others = _shuffled(all_scenes(novel=True), seed), _shuffled(all_scenes(), seed)
    return Concept(
        new=_elsewhere(stars[held_out:], new, 0),
        known=_elsewhere(others[held_out:], known, 1),
        new_held_out=_elsewhere(stars[:held_out], held_out, 2),
        known_held_out=_elsewhere(others[:held_out], held_out, 3),
    )


def write_concept(root: Path, concept: Concept) -> None:
    """Clips, ``metadata.jsonl`` and ``held-out.txt``, as ``cogcache encode`` and ``train --holdout`` take them."""
    rows = []
    for name, scene in concept.sources.items():
        write_mp4(root / name, render(scene, FRAMES, HEIGHT, WIDTH), FPS)
        rows.append({"file_name": name, "text": scene.caption})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (root / "held-out.txt").write_text("".join(f"{name}\n" for name in concept.held_out()), "utf-8")


def _shuffled(scenes: Iterable[Scene], seed: int) -> list[Scene]:
    chosen = list(scenes)
    random.Random(seed).shuffle(chosen)
    return chosen


def _elsewhere(scenes: Sequence[Scene], count: int, group: int) -> tuple[Scene, ...]:
    seeds = range(_FIRST_SEED + group * 10_000, _FIRST_SEED + group * 10_000 + count)
    return tuple(replace(scenes[n % len(scenes)], seed=seed) for n, seed in enumerate(seeds))
