"""First frames as PNG files, and ``images.txt``.

Mutations tried, each caught: names by stem alone; no hash where names meet; list written although a video failed;
existing list replaced; stored instead of square pixels; pictures of changed videos kept; edited pictures replaced;
links followed out of the data root; a later frame.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from making_videos import numbers, picture, write_video
from PIL import Image

from cogcache.cli import run
from cogcache.config import ExtractImagesConfig
from cogcache.errors import ConfigError, DatasetError, PartialFailureError
from cogcache.precompute.datasets import find_clips
from cogcache.precompute.extract import extract_images, image_names

SCRIPT = Path(__file__).parents[2] / "scripts" / "extract_images"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of the same name in two folders, and one beside them. Read only."""
    root = tmp_path_factory.mktemp("listed")
    for number, name in enumerate(("a/clip.mp4", "b/clip.mp4", "b/other.mp4")):
        (root / name).parent.mkdir(exist_ok=True)
        write_video(root / name, frames=4, image=lambda n, base=50 * number: picture(base + n))
    (root / "videos.txt").write_text("a/clip.mp4\nb/clip.mp4\nb/other.mp4\n")
    (root / "prompts.txt").write_text("one\ntwo\nthree\n")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "root")


def extract(root: Path, **more: Any) -> Any:
    return extract_images(ExtractImagesConfig(data_root=root, **more))


def shown(path: Path) -> int:
    """The number that a picture of our test videos shows."""
    return numbers(pixels(path)[None])[0]


def pixels(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image).copy()


def test_first_frames_beside_their_videos_line_by_line(root: Path) -> None:
    result = extract(root)
    assert (result.written, result.kept, result.failures) == (3, 0, {})
    assert (root / "images.txt").read_text() == "images/a/clip.png\nimages/b/clip.png\nimages/b/other.png\n"
    assert [shown(root / name) for name in result.images] == [0, 50, 100]
    assert {pixels(root / name).shape for name in result.images} == {(96, 160, 3)}
    items = find_clips(root, "lists", False)
    assert [(item.source, item.image) for item in items] == [
        ("a/clip.mp4", "images/a/clip.png"),
        ("b/clip.mp4", "images/b/clip.png"),
        ("b/other.mp4", "images/b/other.png"),
    ]
    assert sorted(p.name for p in (root / "images").rglob("*") if p.is_file() and p.suffix != ".png") == [
        ".lock"
    ]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["videos/a.mp4", "videos/b.mp4"], ["a", "b"]),  # as in the reference's own layout
        (["a.mp4"], ["a"]),
        (["x/a.mp4", "y/a.mp4"], ["x/a", "y/a"]),
        (["x/y/a.mp4", "x/z/a.mp4", "x/b.mp4"], ["y/a", "z/a", "b"]),
        (["x/a.mp4", "x/a.mp4", "x/b.mp4"], ["a", "a", "b"]),  # listed twice with other captions
        (["x/a.b.mp4", "x/a.mp4"], ["a.b", "a"]),
    ],
)
def test_names(sources: list[str], expected: list[str]) -> None:
    assert image_names(sources, PurePosixPath("images")) == [f"images/{name}.png" for name in expected]


def test_names_never_meet_and_never_leave_the_folder() -> None:
    sources = ["a.mp4", "a.mov", "A.mp4", "/far/a.mp4", "../a.mp4", "../../b/../a.mp4", "d/a.mp4"]
    names = image_names(sources, PurePosixPath("images"))
    assert len({name.casefold() for name in names}) == len(sources)
    for name in names:
        assert name.startswith("images/")
        assert ".." not in PurePosixPath(name).parts
    assert names[-1] == "images/d/a.png"


def test_goes_on_where_it_was_stopped_and_takes_changed_videos_anew(root: Path) -> None:
    extract(root)
    again = extract(root)
    assert (again.written, again.kept) == (0, 3)
    (root / "images" / "b" / "clip.png").unlink()
    shutil.copy(root / "b" / "other.mp4", root / "a" / "clip.mp4")
    more = extract(root)
    assert (more.written, more.kept) == (2, 1)
    assert shown(root / "images" / "a" / "clip.png") == 100


def test_edited_pictures_and_other_lists_stay_unless_told(root: Path) -> None:
    extract(root)
    Image.fromarray(picture(9)).save(root / "images" / "a" / "clip.png")
    assert extract(root).kept == 3
    assert shown(root / "images" / "a" / "clip.png") == 9
    (root / "images.txt").write_text("mine.png\n")
    with pytest.raises(DatasetError, match=r"images\.txt is there already") as caught:
        extract(root)
    assert "--overwrite" in caught.value.hint
    assert (root / "images.txt").read_text() == "mine.png\n"
    assert extract(root, overwrite=True).written == 3
    assert shown(root / "images" / "a" / "clip.png") == 0
    assert (root / "images.txt").read_text().startswith("images/a/clip.png\n")


def test_unreadable_videos_are_listed_and_no_line_shifts(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (root / "b" / "clip.mp4").read_bytes()
    (root / "b" / "clip.mp4").write_bytes(good[:500])
    assert run(["extract-images", f"--data-root={root}"]) == 3
    said = capsys.readouterr().err
    assert "2 images written, 0 already there, 1 failed" in said
    assert "b/clip.mp4: " in said
    assert "Traceback" not in said
    assert not (root / "images.txt").exists()
    assert shown(root / "images" / "b" / "other.png") == 100
    with pytest.raises(PartialFailureError):
        extract(root)
    (root / "b" / "clip.mp4").write_bytes(good)
    result = extract(root)
    assert (result.written, result.kept) == (1, 2)
    assert len((root / "images.txt").read_text().splitlines()) == 3


def test_upright_with_square_pixels_by_time(tmp_path: Path) -> None:
    """A picture stored lying and narrow comes out as a player shows it, and first is what is shown first."""
    from fractions import Fraction

    from making_videos import ffmpeg

    def narrow(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    write_video(tmp_path / "wide.mp4", frames=3, setup=narrow)
    write_video(tmp_path / "plain.mp4", frames=8, options={"bf": "3", "g": "8"})
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    (tmp_path / "videos.txt").write_text("wide.mp4\nturned.mp4\nplain.mp4\n")
    extract(tmp_path)
    shapes = [pixels(tmp_path / "images" / f"{name}.png").shape for name in ("wide", "turned", "plain")]
    assert shapes == [(96, 320, 3), (160, 96, 3), (96, 160, 3)]
    assert shown(tmp_path / "images" / "plain.png") == 0
    turned = pixels(tmp_path / "images" / "turned.png")
    assert numbers(np.rot90(turned, -1)[None]) == [0]


@pytest.mark.parametrize("name", ["../out", "/tmp/out"])
def test_output_stays_inside(root: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="leaves the data root"):
        extract(root, output=Path(name))


def test_links_lead_nothing_out(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="leaves the data root"):
        extract(root)
    (root / "images").unlink()
    (root / "images").mkdir()
    (root / "images" / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PartialFailureError):
        extract(root)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda r: (r / "videos.txt").write_text("a/clip.mp4\n\nnothing.mp4\n"),
            ("line 2: blank", "nothing.mp4"),
        ),
        (lambda r: (r / "videos.txt").write_text("../x.mp4\n"), ("leaves the data root",)),
        (lambda r: (r / "videos.txt").unlink(), ("has no videos.txt", "metadata.jsonl")),
        (lambda r: (r / "videos.txt").write_text(""), ("videos.txt is empty",)),
    ],
)
def test_mistakes_are_told(root: Path, change: Callable[[Path], object], words: tuple[str, ...]) -> None:
    change(root)
    with pytest.raises(DatasetError) as caught:
        extract(root)
    assert all(word in str(caught.value) for word in words)
    assert not (root / "images").exists()


def test_a_data_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no videos\.txt"):
        extract(tmp_path / "nowhere")


def test_the_script_works_from_anywhere(root: Path) -> None:
    done = subprocess.run(
        [str(SCRIPT), "--data-root", "."], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (root / "images.txt").exists()
