"""One picture of a demo: real frames, reconstructions, what base and LoRA generate, and the loss curve."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cogcache.demo.show import Clip, Show

__all__ = ["draw_demo", "draw_losses"]

_PAPER, _INK, _FAINT, _LINE, _RAW = "#faf8f4", "#26231f", "#8c857b", "#b3441e", "#e5c4b4"
_MARGIN, _GAP, _THUMB_WIDTH = 48, 12, 232
_COLUMNS, _PLOT_HEIGHT, _TALLEST = 5, 260, 6000
_WIDTH = 2 * _MARGIN + _COLUMNS * _THUMB_WIDTH + (_COLUMNS - 1) * _GAP


def draw_demo(content: Show, path: Path) -> None:
    """Draw ``content`` and save it as a PNG."""
    pen = _Pen(_WIDTH)
    pen.text(content.title, 30, _INK, gap=10)
    pen.paragraph(content.remark, 17, _LINE)
    for clip in content.clips:
        _draw_clip(pen, clip)
    pen.text("Training loss (per step, and its running mean)", 19, _INK, gap=8)
    pen.plot(content.losses, _WIDTH - 2 * _MARGIN)
    pen.done().save(path)


def draw_losses(losses: Sequence[tuple[int, float]], width: int) -> Image.Image:
    """The loss curve alone."""
    pen = _Pen(width)
    pen.plot(losses, width - 2 * _MARGIN)
    return pen.done()


def _draw_clip(pen: _Pen, clip: Clip) -> None:
    pen.down(16)
    pen.paragraph(f"“{clip.caption}”", 17, _FAINT)
    pen.row("Real: frames of the clip this caption belongs to", clip.real)
    pen.row(f"Decoded: what the VAE makes of its stored latents, {clip.psnr_db:.1f} dB", clip.decoded)
    for made in clip.generations:
        pen.row(f"Base model, seed {made.seed}", made.base)
        pen.row(f"With the trained LoRA, seed {made.seed}", made.lora)


class _Pen:
    """Writes down a sheet from top to bottom."""

    def __init__(self, width: int) -> None:
        self.sheet = Image.new("RGB", (width, _TALLEST), _PAPER)
        self.draw, self.y, self.width = ImageDraw.Draw(self.sheet), _MARGIN, width

    def done(self) -> Image.Image:
        return self.sheet.crop((0, 0, self.width, self.y + _MARGIN))

    def down(self, pixels: int) -> None:
        self.y += pixels

    def text(self, text: str, size: int, fill: str, gap: int) -> None:
        font = ImageFont.load_default(size)
        self.draw.text((_MARGIN, self.y), text, fill=fill, font=font)
        self.down(int(size * 1.2) + gap)

    def paragraph(self, text: str, size: int, fill: str) -> None:
        for line in textwrap.wrap(text, self.width // 9):
            self.text(line, size, fill, gap=4)
        self.down(12)

    def row(self, title: str, frames: NDArray[np.uint8]) -> None:
        self.text(title, 17, _INK, gap=6)
        picks = np.linspace(0, len(frames) - 1, _COLUMNS).round().astype(int)
        height = round(frames.shape[1] * _THUMB_WIDTH / frames.shape[2])
        for column, pick in enumerate(picks):
            thumb = Image.fromarray(frames[pick]).resize((_THUMB_WIDTH, height), Image.Resampling.LANCZOS)
            self.sheet.paste(thumb, (_MARGIN + column * (_THUMB_WIDTH + _GAP), self.y))
        self.down(height + 20)

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


def _running_mean(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Over about a sixth of all steps: timesteps are drawn at random, so single losses say little."""
    half = max(4, len(points) // 12)
    means = []
    for index, (step, _) in enumerate(points):
        near = [loss for _, loss in points[max(0, index - half) : index + half + 1]]
        means.append((step, sum(near) / len(near)))
    return means
