"""A made-up world of one moving shape a clip, whose captions say exactly what is seen.

So it can be measured whether a video follows its prompt: which colour is where, and where it goes. Every scene is a
function of its fields and a seed alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "MOTIONS",
    "NOVEL",
    "SHAPES",
    "Scene",
    "all_scenes",
    "position",
    "render",
]

Image = npt.NDArray[np.uint8]
Field = npt.NDArray[Any]
"""Floating point."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (50, 190, 70),
    "blue": (50, 90, 230),
    "yellow": (240, 215, 50),
    "white": (240, 240, 240),
    "cyan": (60, 210, 220),
    "orange": (245, 140, 30),
    "pink": (250, 120, 200),
}
"""sRGB of each colour word."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 14),
    "grey": (120, 120, 122),
    "dark blue": (22, 30, 80),
    "dark green": (20, 62, 36),
    "brown": (92, 62, 40),
}

MOTIONS: dict[str, tuple[float, float]] = {
    "moves from left to right": (0.0, 1.0),
    "moves from right to left": (0.0, -1.0),
    "moves up": (-1.0, 0.0),
    "moves down": (1.0, 0.0),
    "stays still in the middle": (0.0, 0.0),
}
"""Direction as (down, right)."""

SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
SIZES = {"small": 0.14, "large": 0.24}
"""Half the extent, of the picture's height."""

NOVEL = ("star", "pink")
"""Shape and colour that only clips for fine-tuning show: what a LoRA can teach."""

_TRAVEL, _ASIDE = 0.5, 0.12
"""How far a shape goes, and how far from the middle its way may lie, of the picture's extent."""


@dataclass(frozen=True)
class Scene:
    """One shape, its colour, size, motion and background; ``seed`` shifts where it starts."""

    shape: str
    colour: str
    size: str
    motion: str
    background: str
    seed: int = 0

    @property
    def caption(self) -> str:
        """What is seen: ``A large red circle moves up on a grey background.``"""
        return f"A {self.size} {self.colour} {self.shape} {self.motion} on a {self.background} background."

    def path(self, frames: int) -> Field:
        """Centre of the shape in each frame, float32 ``[F, 2]``: down and right, 0 to 1."""
        way = np.array(MOTIONS[self.motion])
        aside = np.random.default_rng(self.seed).uniform(-_ASIDE, _ASIDE) * np.abs(way[::-1])
        steps = np.linspace(-0.5, 0.5, frames)[:, None] if frames > 1 else np.zeros((1, 1))
        centre: Field = (0.5 + aside + _TRAVEL * steps * way).astype(np.float32)
        return centre


def all_scenes(*, novel: bool = False) -> Iterator[Scene]:
    """Every combination, in a fixed order, without the shape and colour kept back; ``novel``: only those of both."""
    for values in itertools.product(SHAPES, COLOURS, SIZES, MOTIONS, BACKGROUNDS):
        kept_back = (values[0] == NOVEL[0]) + (values[1] == NOVEL[1])
        if kept_back == (2 if novel else 0):
            yield Scene(*values)


def render(scene: Scene, frames: int, height: int, width: int) -> Image:
    """The clip, uint8 ``[F, H, W, 3]``, with edges one pixel soft."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    colour, ground = (
        np.array(table, np.float32) for table in (COLOURS[scene.colour], BACKGROUNDS[scene.background])
    )
    shade = 1 + 0.12 * (rows / height - 0.5)[..., None]
    extent = SIZES[scene.size] * height
    clip = np.empty((frames, height, width, 3), np.uint8)
    for number, (down, right) in enumerate(scene.path(frames)):
        y, x = rows - down * height, columns - right * width
        cover = np.clip(0.5 - _distance(scene.shape, y, x, extent), 0, 1)[..., None]
        clip[number] = np.clip(np.rint(cover * colour + (1 - cover) * ground * shade), 0, 255)
    return clip


def _distance(shape: str, y: Field, x: Field, extent: float) -> Field:
    """Pixels from the shape's edge, negative inside; good to a pixel near the edge, which is all that is used."""
    far: Field = np.hypot(y, x)
    if shape == "circle":
        return far - extent
    if shape == "ring":
        return np.abs(far - 0.75 * extent) - 0.28 * extent
    if shape == "square":
        return np.maximum(np.abs(y), np.abs(x)) - 0.9 * extent
    if shape == "cross":
        bars = [np.maximum(np.abs(a) - extent, np.abs(b) - 0.32 * extent) for a, b in ((y, x), (x, y))]
        return np.minimum(*bars)
    if shape == "triangle":
        return np.maximum(y - 0.7 * extent, 0.894 * np.abs(x) - 0.447 * (y + extent * 1.05))
    return _star(y, x, far, extent)


def _star(y: Field, x: Field, far: Field, extent: float) -> Field:
    """Five points: a fifth of a turn is folded onto one point, whose side is a straight line."""
    fifth = 2 * np.pi / 5
    turn = np.arctan2(x, -y)
    folded = np.abs((turn + fifth / 2) % fifth - fifth / 2)
    tip, notch = (
        np.array([0.0, 1.1 * extent]),
        0.45 * extent * np.array([np.sin(fifth / 2), np.cos(fifth / 2)]),
    )
    side = notch - tip
    normal = np.array([-side[1], side[0]]) / np.hypot(*side)
    distance: Field = (far * np.sin(folded) - tip[0]) * normal[0] + (far * np.cos(folded) - tip[1]) * normal[
        1
    ]
    return distance


def position(frames: Image, colour: str, tolerance: float = 90.0) -> Field:
    """Where a colour is: the centre of all pixels near it, ``[F, 2]``, down and right, 0 to 1; NaN where none is.

    Args:
        frames: uint8 ``[F, H, W, 3]``.
        tolerance: Largest distance in sRGB.
    """
    height, width = frames.shape[1:3]
    near = (
        np.linalg.norm(frames.astype(np.float32) - np.array(COLOURS[colour], np.float32), axis=-1) < tolerance
    )
    found = np.full((len(frames), 2), np.nan, np.float32)
    for number, mask in enumerate(near):
        if mask.any():
            rows, columns = np.nonzero(mask)
            found[number] = (rows.mean() + 0.5) / height, (columns.mean() + 0.5) / width
    return found
