"""Single pictures of what ``footage.jsonl`` lists, at many scales: what the VAE learns to draw fine structure from.

Clips show each photograph and each shot at one scale, and that is soon learnt by heart. Crops from a whole picture down
to its pixels have far more to show.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from windows import frames_at

SIZE = (128, 192)
"""Height and width: room for a clip's crop to move in."""

SECONDS = 0.5
"""Between the frames that are taken of a shot."""

_QUALITY = 92


def write_pictures(listed: Path, out: Path, count: int, seed: int = 0) -> None:
    """Write ``count`` crops of :data:`SIZE` as JPEG files to a new folder: half of photographs, half of films' frames.

    Args:
        listed: JSON lines as :func:`windows.windows` reads them.
    """
    out.mkdir(parents=True)
    draw = random.Random(seed)
    lines = [json.loads(line) for line in listed.read_text("utf-8").splitlines()]
    photographs = sorted({listed.parent / line["file"] for line in lines if "from" in line})
    shots = {
        (listed.parent / line["file"], line["start"], line["end"], tuple(line.get("rows", (0.0, 1.0))))
        for line in lines
        if "from" not in line
    }
    groups = [
        group
        for group in (
            [_open(path) for path in photographs],
            [frame for shot in sorted(shots) for frame in _frames(*shot)],
        )
        if group
    ]
    for number in range(count):
        group = groups[number % len(groups)]
        picture = group[number // len(groups) % len(group)]
        _crop(picture, draw).save(out / f"{number:05}.jpg", quality=_QUALITY)


def read_pictures(folder: Path) -> np.ndarray:
    """All pictures of a folder, uint8 [N, 128, 192, 3]."""
    return np.stack([np.asarray(_open(path)) for path in sorted(folder.glob("*.jpg"))])


def _open(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _frames(path: Path, start: float, end: float, rows: Sequence[float]) -> Iterator[Image.Image]:
    for frame in frames_at(path, np.arange(start, end, SECONDS)):
        picture = frame.to_image()
        top, bottom = (round(share * picture.height) for share in rows)
        yield picture.crop((0, top, picture.width, bottom))


def _crop(picture: Image.Image, draw: random.Random) -> Image.Image:
    """Somewhere in the picture, from its own pixels to all of it that fits, all scales equally likely."""
    height, width = SIZE
    most = min(picture.height, picture.width * height / width)
    tall = min(most, math.exp(draw.uniform(math.log(min(height, most)), math.log(most))))
    wide = tall * width / height
    left, top = (
        draw.uniform(0, max(0.0, have - take)) for have, take in zip(picture.size, (wide, tall), strict=True)
    )
    return picture.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + wide, top + tall))
