"""The demo makes what it says, and makes it once."""

from __future__ import annotations

import base64
import io
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogcache.cli import run
from cogcache.demo import recipe as recipes
from cogcache.demo import run_demo
from cogcache.demo.page import demo_page
from cogcache.demo.picture import draw_demo
from cogcache.demo.recipe import Recipe, choose_recipe
from cogcache.demo.run import CLIPS
from cogcache.demo.show import Clip, Generation, Show
from cogcache.errors import ConfigError
from cogcache.inspect.gallery import allowed
from cogcache.small import KINDS, small_model
from cogcache.tiny import Family

sys.path.insert(0, str(Path(__file__).parent / "small"))
from small_kit import random_work, recipe


@pytest.fixture
def tiny_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in an installation without the small model's weights."""
    monkeypatch.setattr(recipes, "WEIGHTS", tmp_path / "no-weights")


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*.*")}


@pytest.mark.usefixtures("tiny_only")
def test_demo_takes_eight_clips_all_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a [/demo]"
    result = run_demo(output, "5b", 3)
    assert set(result.made) == {"model", "encode", "train", "infer", "show"} == set(result.seconds)
    assert all(path.exists() for path in result.made.values())
    assert len((output / "shards" / "samples.jsonl").read_text().splitlines()) == 8
    assert len((output / "run" / "metrics.jsonl").read_text().splitlines()) >= 3
    with Image.open(output / "demo.png") as image:
        assert image.width > 1000
        assert image.height > 600
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 20
    said = capsys.readouterr().err
    assert "weights are random" in said
    assert "demo.html" in said
    assert (output / "base.mp4").read_bytes() != (output / "lora.mp4").read_bytes()

    before = stamps(output)
    again = run_demo(output, "5b", 3)
    assert again.made == result.made
    kept = {name for name in before if name.startswith(("model/", "run/")) or name.endswith(".tar")}
    after = stamps(output)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after.keys() == before.keys()
    with pytest.raises(ConfigError, match="holds a demo of a tiny 5b model"):
        run_demo(output, "2b", 3)


@pytest.mark.usefixtures("tiny_only")
@pytest.mark.parametrize("family", ["2b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_demo_runs_for_every_family(tmp_path: Path, family: Family) -> None:
    made = run_demo(tmp_path / "demo", family, 1).made
    assert all(path.exists() for path in made.values())
    assert any((tmp_path / "demo").glob("first-frame-*.png")) == family.endswith("i2v")


def test_the_small_model_is_taken_and_shown_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are random here, and few steps are done: what it takes is what is looked at. By image-to-video, which
    takes most."""
    recipe("ship").ship(random_work(tmp_path / "work"), tmp_path / "weights")
    (tmp_path / "weights" / "MODEL_CARD.md").write_text("# The card\n")
    monkeypatch.setattr(recipes, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setitem(small_model.__kwdefaults__, "weights", tmp_path / "weights")
    usual = Recipe("5b-i2v", "i2v", 1)
    few, short = {**usual.infer(), "steps": 1}, {**usual.encode(), "image_draws": 1}
    monkeypatch.setattr(Recipe, "infer", lambda _: few)
    monkeypatch.setattr(Recipe, "encode", lambda _: short)
    monkeypatch.setattr(Recipe, "shown", (2,))
    monkeypatch.setattr("cogcache.demo.run.CLIPS", first_clips(tmp_path / "clips", 3))
    output = tmp_path / "demo"
    assert run(["demo", "--output", str(output), "--task", "i2v", "--steps", "1"]) == 0
    assert (output / "model" / "README.md").read_text() == "# The card\n"
    assert len(list(output.glob("lora-*.mp4"))) == len(list(output.glob("base-*.mp4"))) == 2
    page = (output / "demo.html").read_text("utf-8")
    assert "small 5b-i2v model with trained weights" in page
    assert len(list(output.glob("first-frame-*.png"))) == 1
    found = pictures(page)
    assert [picture.format for picture in found] == ["WEBP"] * 6 + ["PNG"]
    assert {picture.size for picture in found[:-1]} == {(144, 96)}
    assert getattr(found[0], "n_frames", 1) == 17  # equal frames, which random weights may make, would be one


def first_clips(folder: Path, count: int) -> Path:
    """A data root of some of the demo's clips."""
    (folder / "videos").mkdir(parents=True)
    for name in ("videos.txt", "prompts.txt"):
        lines = (CLIPS / name).read_text("utf-8").splitlines()[:count]
        (folder / name).write_text("\n".join(lines), "utf-8")
    for video in (folder / "videos.txt").read_text("utf-8").splitlines():
        shutil.copy(CLIPS / video, folder / video)
    return folder


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_which_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recipes, "WEIGHTS", tmp_path)
    (tmp_path / "vae").mkdir()
    assert choose_recipe(None, None, None) == Recipe("5b", None, 60)  # a VAE alone generates nothing
    for kind in KINDS:
        (tmp_path / kind).mkdir()
    assert choose_recipe(None, None, None) == Recipe("5b", "t2v", 130)
    assert choose_recipe(None, "i2v", 7) == Recipe("5b-i2v", "i2v", 7)
    assert choose_recipe("1.5-5b", None, None).kind == "t2v-1.5"
    assert choose_recipe("1.5-5b", "i2v", None) == Recipe("1.5-5b-i2v", None, 60)
    assert choose_recipe("2b", None, None) == Recipe("2b", None, 60)
    assert "random" in choose_recipe("2b", None, None).remark
    for family, task in (("2b", "i2v"), ("5b-i2v", "t2v")):
        with pytest.raises(ConfigError, match=f"no {task} model of family {family}"):
            choose_recipe(family, task, None)
    monkeypatch.setattr(recipes, "WEIGHTS", tmp_path / "none")
    assert choose_recipe(None, None, None) == Recipe("5b", None, 60)


def a_show(caption: str) -> Show:
    def video(value: int) -> np.ndarray:
        return np.full((9, 32, 48, 3), value, np.uint8)

    clip = Clip(caption, video(250), video(200), 31.25, (Generation(7, video(150), video(100)),))
    return Show("A demo", "Look.", 8.0, [clip], [(n, 1 / n) for n in range(1, 40)])


def test_the_page_needs_and_runs_nothing_else() -> None:
    page = demo_page(a_show('A <b>bold</b> "caption" & more<script>alert(1)</script>'))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    style = page.split("<style>")[1].split("</style>")[0]
    assert f"style-src {allowed(style)};" in page
    assert "style=" not in page  # which the policy would not allow
    assert "31.2 dB" in page
    assert re.findall(r"<b>(\w+)</b>", page) == ["Real", "Decoded", "Base", "LoRA"]
    greys = [np.asarray(picture.convert("RGB")).mean() for picture in pictures(page)[:4]]
    assert greys == pytest.approx([250, 200, 150, 100], abs=3)


def test_the_picture_has_a_row_for_each(tmp_path: Path) -> None:
    draw_demo(a_show("A caption"), tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as image:
        column = np.asarray(image.convert("L"))[:, 100].astype(int)
    rows = [value for n, value in enumerate(column) if n and value != column[n - 1]]
    assert [value for value in rows if value in (250, 200, 150, 100)][-3:] == [200, 150, 100]


def test_clips_come_with_captions_and_attribution() -> None:
    prompts = (CLIPS / "prompts.txt").read_text("utf-8").splitlines()
    videos = (CLIPS / "videos.txt").read_text("utf-8").splitlines()
    assert len(prompts) == len(videos) == 8
    assert all((CLIPS / video).is_file() for video in videos)
    assert "Creative Commons" in (CLIPS / "ATTRIBUTION.md").read_text("utf-8")
