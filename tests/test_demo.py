"""The demo makes what it says, and makes it once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogcache.demo import run_demo
from cogcache.demo.run import CLIPS
from cogcache.errors import ConfigError
from cogcache.tiny import Family


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*.*")}


def test_demo_takes_eight_clips_all_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a [/demo]"
    result = run_demo(output, "5b", 3)
    assert set(result.made) == {"model", "encode", "train", "infer", "picture"} == set(result.seconds)
    assert all(path.exists() for path in result.made.values())
    assert len((output / "shards" / "samples.jsonl").read_text().splitlines()) == 8
    assert len((output / "run" / "metrics.jsonl").read_text().splitlines()) >= 3
    with Image.open(result.made["picture"]) as image:
        assert image.width > 1000
        assert image.height > 600
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 20
    said = capsys.readouterr().err
    assert "weights are random" in said
    assert "demo.png" in said

    before = stamps(output)
    again = run_demo(output, "5b", 3)
    assert again.made == result.made
    kept = {name for name in before if name.startswith(("model/", "run/")) or name.endswith(".tar")}
    after = stamps(output)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after.keys() == before.keys()
    with pytest.raises(ConfigError, match="holds a demo of family 5b"):
        run_demo(output, "2b", 3)


@pytest.mark.parametrize("family", ["2b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_demo_runs_for_every_family(tmp_path: Path, family: Family) -> None:
    made = run_demo(tmp_path / "demo", family, 1).made
    assert all(path.exists() for path in made.values())
    assert (tmp_path / "demo" / "first-frame.png").exists() == family.endswith("i2v")


def test_clips_come_with_captions_and_attribution() -> None:
    prompts = (CLIPS / "prompts.txt").read_text("utf-8").splitlines()
    videos = (CLIPS / "videos.txt").read_text("utf-8").splitlines()
    assert len(prompts) == len(videos) == 8
    assert all((CLIPS / video).is_file() for video in videos)
    assert "Creative Commons" in (CLIPS / "ATTRIBUTION.md").read_text("utf-8")
