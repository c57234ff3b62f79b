"""Draws one picture of a demo: input frames, generated frames and the loss curve."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["DemoPicture", "draw_demo"]

_PAPER, _INK, _FAINT, _LINE, _RAW = "#faf8f4", "#26231f", "#8c857b", "#b3441e", "#e5c4b4"
_MARGIN, _GAP, _THUMB_WIDTH = 48, 12, 232
_PLOT_HEIGHT = 260


@dataclass(frozen=True)
class DemoPicture:
    """What to show. Frames are uint8 ``[F, H, W, 3]``; ``losses`` are (step, loss)."""

    family: str
    prompt: str
    source: NDArray[np.uint8]
    generated: NDArray[np.uint8]
    losses: Sequence[tuple[int, float]]


def draw_demo(content: DemoPicture, path: Path) -> None:
    """Draw ``content`` and save it as a PNG."""
    columns = max(len(content.source), len(content.generated))
    width = 2 * _MARGIN + columns * _THUMB_WIDTH + (columns - 1) * _GAP
    sheet = Image.new("RGB", (width, 1400), _PAPER)
    pen = _Pen(sheet)
    pen.text(f"cogcache demo, tiny {content.family} model", 30, _INK, gap=10)
    for line in textwrap.wrap(f"“{content.prompt}”", width // 9):
        pen.text(line, 17, _FAINT, gap=4)
    pen.down(20)
    pen.text("Input: frames of the clip this caption belongs to", 19, _INK, gap=8)
    pen.frames(content.source)
    pen.text("Generated with the trained LoRA by the stock pipeline", 19, _INK, gap=4)
    pen.text("This model's weights are random, so what it generates is noise.", 16, _LINE, gap=8)
    pen.frames(content.generated)
    pen.text("Training loss (per step, and its running mean)", 19, _INK, gap=8)
    pen.plot(content.losses, width - 2 * _MARGIN)
    sheet.crop((0, 0, width, pen.y + _MARGIN)).save(path)


class _Pen:
    """Writes down the sheet from top to bottom."""

    def __init__(self, sheet: Image.Image) -> None:
        self.sheet, self.draw, self.y = sheet, ImageDraw.Draw(sheet), _MARGIN

    def down(self, pixels: int) -> None:
        self.y += pixels

    def text(self, text: str, size: int, fill: str, gap: int) -> None:
        font = ImageFont.load_default(size)
        self.draw.text((_MARGIN, self.y), text, fill=fill, font=font)
        self.down(int(size * 1.2) + gap)

    def frames(self, frames: NDArray[np.uint8]) -> None:
        height = 0
        for column, frame in enumerate(frames):
            image = Image.fromarray(frame)
            height = round(image.height * _THUMB_WIDTH / image.width)
            thumb = image.resize((_THUMB_WIDTH, height), Image.Resampling.LANCZOS)
            self.sheet.paste(thumb, (_MARGIN + column * (_THUMB_WIDTH + _GAP), self.y))
        self.down(height + 28)

    def plot(self, points: Sequence[tuple[int, float]], width: int) -> None:
        top, bottom, left = self.y, self.y + _PLOT_HEIGHT, _MARGIN + 56
        right = _MARGIN + width
        values = [loss for _, loss in points] or [0.0]
        low, high = min(values), max(values)
        span = (high - low) or 1.0
        last = max((step for step, _ in points), default=1)
        font = ImageFont.load_default(14)
        for share in (0.0, 0.5, 1.0):
            y = bottom - share * _PLOT_HEIGHT
            self.draw.line([(left, y), (right, y)], fill="#e4dfd6")
            self.draw.text((_MARGIN, y - 9), f"{low + share * span:.3f}", fill=_FAINT, font=font)

        def place(step: float, loss: float) -> tuple[float, float]:
            return left + (right - left) * step / last, bottom - (loss - low) / span * _PLOT_HEIGHT

        for curve, colour, thick in ((points, _RAW, 2), (_running_mean(points), _LINE, 3)):
            if len(curve) > 1:
                self.draw.line([place(*point) for point in curve], fill=colour, width=thick, joint="curve")
        self.draw.text((left, bottom + 8), "0", fill=_FAINT, font=font)
        self.draw.text((right - 70, bottom + 8), f"step {last}", fill=_FAINT, font=font)
        self.y = top + _PLOT_HEIGHT + 30


def _running_mean(points: Sequence[tuple[int, float]], window: int = 9) -> list[tuple[int, float]]:
    half = window // 2
    means = []
    for index, (step, _) in enumerate(points):
        near = [loss for _, loss in points[max(0, index - half) : index + half + 1]]
        means.append((step, sum(near) / len(near)))
    return means
