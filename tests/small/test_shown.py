"""What the VAE of the small model is shown: real pieces of clips, and a camera that moves evenly within a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_kit import recipe_modules

from cogcache.mp4 import write_mp4

SIZE = (5, 16, 24)


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    with recipe_modules("windows", "pictures", "shown") as modules:
        yield modules


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def test_pieces_of_clips_are_pieces_of_clips(scripts: dict[str, ModuleType]) -> None:
    """Every pixel says where it is: frame, row and column in the three colours, mirrored and reversed or not."""
    place = np.stack(np.meshgrid(np.arange(9), np.arange(20), np.arange(30), indexing="ij"), axis=-1)
    clips = torch.from_numpy(np.stack([place, place + 100]).astype(np.uint8))
    steps = set()
    for piece in scripts["shown"].Clips(clips).draw(60, SIZE).int():
        assert piece.shape == (*SIZE, 3)
        frame, row, column = (int(piece[..., axis].diff(dim=axis).unique()) for axis in range(3))
        assert row == 1
        steps.add((frame, column, int(piece[0, 0, 0, 1]) >= 100))
    assert steps == {(a, b, c) for a in (1, -1) for b in (1, -1) for c in (False, True)}


def test_a_camera_moves_evenly_and_stays_in_the_picture(scripts: dict[str, ModuleType]) -> None:
    shown = scripts["shown"]
    rows, columns = np.mgrid[0:32, 0:48] * 5.0
    picture = torch.from_numpy(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8))
    for seen in shown.Pictures(picture[None]).draw(40, SIZE).double():
        assert seen.shape == (*SIZE, 3)
        for axis, extent in ((1, 31 * 5), (2, 47 * 5)):
            colour = seen[..., axis - 1]
            inside = colour.narrow(axis, 1, SIZE[axis] - 2)
            slopes = inside.diff(dim=axis).abs().mean((1, 2)) / 5
            assert (slopes > shown.SCALES[0] - 0.05).all()
            assert (slopes < shown.SCALES[1] + 0.05).all()
            assert colour.min() >= 0
            assert colour.max() <= extent
            centres = colour.mean((1, 2))
            assert centres.diff().diff().abs().max() < 1.0


def test_single_frames_can_be_drawn(scripts: dict[str, ModuleType]) -> None:
    picture = torch.full((3, 32, 48, 3), 77, dtype=torch.uint8)
    seen = scripts["shown"].Pictures(picture).draw(4, (1, 16, 24))
    assert seen.shape == (4, 1, 16, 24, 3)
    assert (seen == 77).all()


def test_kinds_take_turns_and_some_colours_change_places(scripts: dict[str, ModuleType]) -> None:
    shown = scripts["shown"]
    dark, bright = torch.tensor([10, 20, 30]), torch.tensor([110, 120, 130])
    clips = shown.Clips(dark.to(torch.uint8).expand(2, 5, 16, 24, 3))
    pictures = shown.Pictures(bright.to(torch.uint8).expand(2, 32, 48, 3))
    drawn = shown.draw([clips, pictures, pictures], 300, SIZE)
    colours = drawn[:, 0, 0, 0].int()
    assert (drawn == drawn[:, :1, :1, :1]).all()
    assert int((colours.sum(1) == 60).sum()) == 100
    assert (colours.sort(1).values == torch.where(colours.sum(1, keepdim=True) == 60, dark, bright)).all()
    moved = (colours.diff(dim=1) != 10).any(1).float().mean()  # of those drawn to change, one in six stays
    assert 0.1 < moved < 0.32


def test_pictures_show_every_source_at_many_scales(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """A photograph whose columns tell the place, and a film of one grey: half of each, the same for the same seed."""
    ramp = np.broadcast_to(np.linspace(0, 240, 1200)[None, :, None], (800, 1200, 3)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    write_mp4(tmp_path / "film.mp4", np.full((48, 256, 384, 3), 128, np.uint8), 24)
    lines: list[dict[str, Any]] = [
        {"file": "ramp.png", "caption": "A.", "from": [0.5, 0.5, 0.5], "to": [0.5, 0.5, 0.4]},
        {"file": "film.mp4", "caption": "B.", "start": 0.0, "end": 1.5, "fps": 8},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write, read = scripts["pictures"].write_pictures, scripts["pictures"].read_pictures
    for name in ("one", "two"):
        write(tmp_path / "list.jsonl", tmp_path / name, 40)
    found = read(tmp_path / "one")
    assert found.shape == (40, 128, 192, 3)
    assert np.array_equal(found, read(tmp_path / "two"))
    assert np.abs(found[1::2].astype(int) - 128).max() < 8
    spans = found[::2, :, -8:].mean((1, 2, 3)) - found[::2, :, :8].mean((1, 2, 3))
    assert spans.min() > 25  # 192 of 1200 columns: the photograph's own pixels
    assert spans.min() < 80
    assert spans.max() > 150
