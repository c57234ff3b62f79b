"""Footage as windows of the small model's size: shots of films, and a camera moving over photographs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cogcache.small.architecture import FRAMES, HEIGHT, WIDTH

FPS = 8.0
"""Of every clip; a shot of which more pictures a second are taken is therefore seen in slow motion."""

Window = tuple[np.ndarray, str]
"""uint8 [FRAMES, HEIGHT, WIDTH, 3] and its caption."""


def windows(file: Path) -> Iterator[Window]:
    """All windows of a JSON lines file, whose paths are relative to it.

    A shot is ``{"file", "start", "end", "caption"}`` in seconds, and if wanted ``"fps"``: pictures taken a second,
    ``"across"``: where the crop lies, 0 (left) to 1 (right), ``"rows"``: the part of the picture's height without bars.
    A photograph is ``{"file", "caption", "from", "to"}``: the crop at the first and last frame, as centre across,
    centre down and height, each a share of the picture.
    """
    for text in file.read_text("utf-8").splitlines():
        line = json.loads(text)
        path = file.parent / line["file"]
        for frames in [move(path, line["from"], line["to"])] if "from" in line else shot(path, line):
            yield frames, line["caption"]


def shot(path: Path, line: dict[str, Any]) -> Iterator[np.ndarray]:
    """Overlapping windows of a shot, half a window apart."""
    times = np.arange(line["start"], line["end"], 1 / line.get("fps", FPS))
    place = (line.get("across", 0.5), *line.get("rows", (0.0, 1.0)))
    frames = [_crop(frame, *place) for frame in frames_at(path, times)]
    for first in range(0, len(frames) - FRAMES + 1, FRAMES // 2):
        yield np.stack(frames[first : first + FRAMES])


def move(path: Path, begin: tuple[float, float, float], end: tuple[float, float, float]) -> np.ndarray:
    """A crop of a photograph that goes evenly from one place and size to another."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    frames = []
    for across, down, share in np.linspace(begin, end, FRAMES):
        height = share * picture.height
        x, y, width = across * picture.width, down * picture.height, height * WIDTH / HEIGHT
        left, top = max(0.0, x - width / 2), max(0.0, y - height / 2)  # no less, by rounding
        box = (left, top, min(left + width, picture.width), min(top + height, picture.height))
        frames.append(np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box)))
    return np.stack(frames)


def frames_at(path: Path, times: Iterable[float]) -> Iterator[Any]:
    """The first frames of a film at or after each of some rising times in seconds, as PyAV gives them."""
    import av

    wanted = iter(times)
    due = next(wanted, None)
    if due is None:
        return
    with av.open(str(path)) as container:
        container.seek(int(due * av.time_base))  # the key frame before it
        for frame in container.decode(video=0):
            if due is None:
                return
            if frame.time is not None and frame.time >= due - 1e-3:
                yield frame
                due = next(wanted, None)


def _crop(frame: Any, across: float, top: float, bottom: float) -> np.ndarray:
    """The rows wanted, made as high as the model's picture, and as much of their width as it has."""
    scale = HEIGHT / (frame.height * (bottom - top))
    width = max(WIDTH, round(frame.width * scale / 2) * 2)
    picture = frame.reformat(width, round(frame.height * scale), "rgb24", interpolation="AREA").to_ndarray()
    above, left = round(top * picture.shape[0]), round(across * (width - WIDTH))
    cut: np.ndarray = picture[above : above + HEIGHT, left : left + WIDTH]
    return cut
