"""Footage for the small model: nothing of the demo's clips, free licences, and windows that show what is asked."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_kit import recipe_modules

from cogcache.errors import StorageError
from cogcache.hashing import file_sha256
from cogcache.mp4 import read_mp4, write_mp4
from cogcache.small.architecture import FRAMES, HEIGHT, WIDTH

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "scripts" / "small_model"
WANTED: dict[str, Any] = json.loads((SCRIPTS / "footage.json").read_text("utf-8"))
TRAILER = "bunny/trailer_bbb.mp4"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    with recipe_modules("windows", "packages", "clips", "pictures", "footage") as modules:
        yield modules


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Four seconds of 24 frames each, grey by time, the right half 40 brighter, with bars above and below."""
    frames = np.zeros((96, 128, 240, 3), np.uint8)
    frames[:, 16:112] = (np.arange(96) * 2)[:, None, None, None]
    frames[:, 16:112, 120:] += 40
    write_mp4(tmp_path / "film.mp4", frames, 24)
    return tmp_path / "film.mp4"


def test_no_shot_shows_what_is_held_out() -> None:
    for file, film in WANTED["films"].items():
        ranges = [tuple(shot[:2]) for shot in film["shots"]]
        ranges += [tuple(shot[:2]) for shot in WANTED["held_out"].get(file, {"shots": []})["shots"]]
        ranges.sort()
        assert all(first < last for first, last in ranges)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges)), file


def test_every_clip_of_the_demo_is_of_a_shot_held_out() -> None:
    """The opening's are: that film is not among those used. The trailer's lie in the ranges listed."""
    text = (ROOT / "cogcache" / "demo" / "bunny" / "ATTRIBUTION.md").read_text("utf-8")
    rows = re.findall(r"\| `videos/(\w+)\.mp4` \| (.+?) \| (\d+)\.\.(\d+) \|", text)
    assert len(rows) == 8
    assert set(WANTED["films"]) == {TRAILER, "sintel/sintel_trailer-720p.mp4"}
    for name, source, first, last in rows:
        if "trailer" in source:
            assert any(
                begin <= int(first) and int(last) <= end and name in said
                for begin, end, said in WANTED["held_out"][TRAILER]["shots"]
            ), name
        else:
            assert "the film's opening 30 s" in source


def test_every_source_is_pinned_and_free() -> None:
    used = {file.split("/")[0] for file in (*WANTED["films"], *WANTED["photographs"])}
    assert used == set(WANTED["sources"])
    for source in WANTED["sources"].values():
        assert all(source[name] for name in ("title", "by", "stated", "archive", "folder"))
        assert re.match(r"CC-BY-[234]\.0|CC0-1\.0", source["licence"])
        assert not re.search(r"-(SA|NC|ND)", source["licence"])
        assert re.fullmatch(r"[0-9a-f]{64}", source["sha256"])
        assert re.fullmatch(r"[a-z][\w.-]+==?\d[\w.+-]+", source["fetch"][1])


def test_every_line_has_a_caption_and_enough_frames(scripts: dict[str, ModuleType]) -> None:
    sizes = dict.fromkeys(WANTED["photographs"], (2000, 1400))
    footage = scripts["footage"]
    shots = list(footage.shots(WANTED["films"]))
    for line in (*shots, *footage.views(WANTED["photographs"], sizes)):
        assert re.fullmatch(r"[A-Z][\w ,'-]{20,}\.", line["caption"]), line
    for line in shots:
        assert (line["end"] - line["start"]) * line["fps"] >= FRAMES
        assert ("slow motion" in line["caption"]) == (line["fps"] > 8)
    seen = {line["start"] for line in shots}
    assert len(seen) == sum(len(film["shots"]) for film in WANTED["films"].values())


@pytest.mark.parametrize("size", [(640, 427), (2056, 3088), (4000, 1000)])
def test_the_camera_goes_where_it_is_said_and_stays_in_the_picture(
    scripts: dict[str, ModuleType], size: tuple[int, int]
) -> None:
    share = 0.2
    wide = share * size[1] * WIDTH / HEIGHT / size[0]
    lines = list(scripts["footage"].views({"a": [[0.75, 0.25, share, "trees"]]}, {"a": size}))
    assert [line["caption"].split(" over")[0].split(" trees")[0] for line in lines] == [
        *(f"The camera moves {way}" for way in ("right", "left", "down", "up")),
        "The camera zooms in on",
        "The camera zooms out from",
    ]
    for line in lines:
        for across, down, height in (line["from"], line["to"]):
            assert height / 2 <= down + 1e-9 <= 1 - height / 2 + 2e-9
            assert wide * height / share / 2 <= across + 1e-9 <= 1 - wide * height / share / 2 + 2e-9
    steps = [np.sign(np.round(np.subtract(line["to"], line["from"]), 9)).tolist() for line in lines]
    assert steps == [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, -1], [0, 0, 1]]


def test_no_move_without_room(scripts: dict[str, ModuleType]) -> None:
    lines = list(scripts["footage"].views({"a": [[0.5, 0.5, 1.0, "trees"]]}, {"a": (150, 100)}))
    assert [line["caption"] for line in lines] == [
        "The camera zooms in on trees.",
        "The camera zooms out from trees.",
    ]


@pytest.mark.parametrize(("fps", "count"), [(8, 1), (16, 4)])
def test_a_shot_becomes_windows_at_its_own_times(
    scripts: dict[str, ModuleType], film: Path, fps: int, count: int
) -> None:
    line = {"file": "film.mp4", "start": 1.0, "end": 3.9, "caption": "Grey.", "fps": fps, "across": 0.0,
            "rows": [0.125, 0.875]}  # fmt: skip
    (film.parent / "list.jsonl").write_text(json.dumps(line) + "\n", "utf-8")
    found = list(scripts["windows"].windows(film.parent / "list.jsonl"))
    assert [caption for _, caption in found] == ["Grey."] * count
    for number, (frames, _) in enumerate(found):
        assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
        wanted = 2 * (24 + (np.arange(FRAMES) + number * (FRAMES // 2)) * 24 / fps)
        assert np.abs(frames[:, 10:90, 10:100].mean((1, 2, 3)) - wanted).max() < 4
        assert frames[:, 2].min() > 30
        assert frames[:, -3].min() > 30


def test_a_shot_between_key_frames_begins_where_it_is_said(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    grey = np.arange(288) * 0.8
    frames = np.broadcast_to(grey[:, None, None, None], (288, 64, 96, 3)).astype(np.uint8)
    write_mp4(tmp_path / "long.mp4", frames, 24)  # has a key frame every second or two
    found = next(scripts["windows"].shot(tmp_path / "long.mp4", {"start": 9.0, "end": 11.5}))
    assert np.abs(found.mean((1, 2, 3)) - grey[216 : 216 + 3 * FRAMES : 3]).max() < 3


def test_the_crop_lies_where_it_is_wanted(scripts: dict[str, ModuleType], film: Path) -> None:
    line = {"start": 2.0, "end": 4.0, "fps": 12, "rows": [0.125, 0.875]}
    bright = []
    for across in (0.0, 0.5, 1.0):
        frames = next(scripts["windows"].shot(film, {**line, "across": across})).astype(int)
        bright.append((frames > frames[:, 40:41, 2:3] + 20).mean())
    assert bright == pytest.approx([24 / 144, 72 / 144, 120 / 144], abs=0.02)


def test_a_photograph_is_gone_over(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 400)[None, :, None], (200, 400, 3)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    frames = scripts["windows"].move(tmp_path / "ramp.png", (0.375, 0.5, 1.0), (0.625, 0.5, 1.0))
    assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.allclose(frames.mean((1, 2, 3)), np.linspace(0.375, 0.625, FRAMES) * 255, atol=1.5)


def test_what_is_fetched_is_checked(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    archive = tmp_path / "a-1.tar.gz"
    archive.write_bytes(b"anything")
    fetch = scripts["packages"].fetch
    fetch("apt", "a=1", archive, file_sha256(archive))
    with pytest.raises(StorageError, match="another file"):
        fetch("apt", "a=1", archive, "0" * 64)


def test_a_package_manager_that_fails_is_told(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = scripts["packages"]
    monkeypatch.setitem(packages.COMMANDS, "apt", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(StorageError, match="a=1 cannot be fetched") as caught:
        packages.fetch("apt", "a=1", tmp_path / "a-1.deb", "0" * 64)
    assert "a-1.deb" in caught.value.hint
    monkeypatch.setitem(packages.COMMANDS, "apt", [sys.executable, "-c", ""])
    with pytest.raises(StorageError, match=r"has no a-1\.deb"):
        packages.fetch("apt", "a=1", tmp_path / "a-1.deb", "0" * 64)


@pytest.mark.parametrize("kind", ["a.tar.xz", "a.whl"])
def test_members_are_taken_out(scripts: dict[str, ModuleType], tmp_path: Path, kind: str) -> None:
    archive = tmp_path / kind
    _pack(archive, {"x/y/one.png": b"1", "x/y/two.png": b"2", "x/one.png": b"3"})
    extract = scripts["packages"].extract
    extract(archive, "x/y", [tmp_path / "out" / "one.png"])
    assert (tmp_path / "out" / "one.png").read_bytes() == b"1"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["one.png"]
    with pytest.raises(StorageError, match=r"x/y/three\.png"):
        extract(archive, "x/y", [tmp_path / "out" / "three.png"])


def test_lists_of_apt_are_turned_to_sources(scripts: dict[str, ModuleType]) -> None:
    as_source = scripts["packages"].as_source
    assert as_source("# deb off\ndeb [a=b] http://x y main\n") == "# deb off\ndeb-src [a=b] http://x y main\n"
    assert as_source("Types: deb\nURIs: http://deb.x\n") == "Types: deb-src\nURIs: http://deb.x\n"
    assert as_source("Types: deb deb-src\nSuites: s\n") == "Types: deb-src\nSuites: s\n"
    assert as_source("deb-src http://x y main\n") == "deb-src http://x y main\n"


def test_from_archives_to_clips(
    scripts: dict[str, ModuleType], film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, with archives that are there already; then the recipe takes the clips as they are."""
    out = film.parent / "out"
    picture = io.BytesIO()
    Image.fromarray(np.full((100, 160, 3), 90, np.uint8)).save(picture, "png")
    archive = out / "archives" / "a.tar.xz"
    _pack(archive, {"media/film.mp4": film.read_bytes(), "media/p.png": picture.getvalue()})
    source = {"title": "t", "by": "me | you", "licence": "CC0-1.0", "stated": "here", "fetch": ["apt", "a=1"],
              "archive": "a.tar.xz", "sha256": file_sha256(archive), "folder": "media"}  # fmt: skip
    shots = [[0, 95, [0.0, 1.0], "A grey wall that grows brighter"]]
    wanted = {"sources": {"a": source}, "films": {"a/film.mp4": {"rate": 24, "rows": [0.125, 0.875], "shots": shots}},
              "photographs": {"a/p.png": [[0.5, 0.5, 0.5, "a grey wall"]]}}  # fmt: skip
    monkeypatch.setattr(scripts["footage"], "PICTURES", 6)
    scripts["footage"].gather(out, wanted)
    assert scripts["pictures"].read_pictures(out / "pictures").shape == (6, 128, 192, 3)
    rows = [json.loads(line) for line in (out / "clips" / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 2 * (2 + 6) + 6
    frames, fps = read_mp4(out / "clips" / rows[0]["file_name"])
    assert (frames.shape, fps) == ((FRAMES, HEIGHT, WIDTH, 3), 8.0)
    assert len((out / "held_out" / "metadata.jsonl").read_text("utf-8").splitlines()) >= 16
    assert "me \\| you | CC0-1.0 | here | `a=1`" in (out / "LICENCES.md").read_text("utf-8")
    scripts["clips"].write_clips(film.parent / "again", [], [out / "clips"], 1)
    first, again = (folder / rows[3]["file_name"] for folder in (out / "clips", film.parent / "again"))
    assert first.read_bytes() == again.read_bytes()
    shutil.rmtree(out)


def _pack(archive: Path, members: dict[str, bytes]) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive, "w") as wheel:
            for name, data in members.items():
                wheel.writestr(name, data)
        return
    with tarfile.open(archive, "w:xz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
