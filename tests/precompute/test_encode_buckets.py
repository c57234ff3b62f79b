"""Several frame counts and sizes in one cache.

Mutations tried, each caught: keys without the bucket; one group for all shards; buckets of the cache that may be left
out; probes that are not remembered; image conditions all of one size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making_videos import picture, write_video
from PIL import Image

from cogcache.cache.reader import CacheReader
from cogcache.cli import run
from cogcache.config import EncodeConfig
from cogcache.config_io import load_config
from cogcache.errors import ConfigError, MismatchError
from cogcache.precompute import encode_all, shapes
from cogcache.precompute.dry_run import plan_run
from cogcache.precompute.settings import decide

Settings = Callable[..., EncodeConfig]
SHORT, LONG, TALL = "9x32x48", "17x32x48", "17x48x32"
PLACES = {"long.mp4": LONG, "other.mp4": LONG, "short.mp4": SHORT, "tall.mp4": TALL}
TOO_SHORT = "5 frames < every bucket: 9x32x48, 17x32x48, 17x48x32"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 96x160, one upright, one of 12 frames, one of 5, one that is no video. Read only."""
    root = tmp_path_factory.mktemp("data")
    write_video(root / "long.mp4", frames=20)
    write_video(root / "other.mp4", frames=20, image=lambda n: picture(n + 50))
    write_video(root / "tall.mp4", frames=20, image=lambda n: np.rot90(picture(n + 90)).copy())
    write_video(root / "short.mp4", frames=12, image=lambda n: picture(n + 130))
    write_video(root / "tiny.mp4", frames=5, image=lambda n: picture(n + 170))
    (root / "broken.mp4").write_bytes(b"not a video" * 100)
    for number, video in enumerate(sorted(root.glob("*.mp4"))):
        video.with_suffix(".txt").write_text(f"clip {number}")
    return root


@pytest.fixture
def several(settings: Settings, data: Path) -> Settings:
    """Encoding of these clips in three buckets."""

    def make(family: str = "5b", **changes: Any) -> EncodeConfig:
        values = {"data_root": data, "frames": None, "size": None, "bucket": [SHORT, LONG, TALL]}
        return settings(family, **{**values, **changes})

    return make


def files(root: Path) -> dict[str, bytes]:
    found = (p for p in sorted(root.rglob("*")) if p.is_file() and p.name != "journal.jsonl")
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in found}


def places(root: Path) -> dict[str, str]:
    return {row.source: str(row.bucket) for row in CacheReader(root).samples}


def test_each_clip_has_the_entry_that_a_cache_of_its_bucket_alone_has(
    several: Settings, settings: Settings, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    flags = [f"--bucket={bucket}" for bucket in (TALL, SHORT, LONG, SHORT)]
    common = several(bucket=[]).model_dump(mode="json", exclude_none=True, exclude_unset=True)
    common.pop("bucket")
    assert run(["encode", *flags, *(f"--{k.replace('_', '-')}={v}" for k, v in common.items())]) == 3
    reader = CacheReader(shards)
    assert places(shards) == PLACES
    reasons = {row.source: row.reason for row in reader.failures}
    assert reasons["tiny.mp4"] == TOO_SHORT
    assert reasons.keys() == {"tiny.mp4", "broken.mp4"}
    assert "bucket" not in reasons["broken.mp4"]
    assert [s.name for s in reader.manifest.series["latents"].shards] == [
        f"latents-{bucket}-00000" for bucket in (SHORT, LONG, TALL)
    ]
    assert [s.name for s in reader.manifest.series["text"].shards] == ["text-226-00000"]
    assert json.loads((shards / "cache.json").read_text())["buckets"] == [SHORT, LONG, TALL]
    for bucket in (SHORT, LONG, TALL):
        frames, size = bucket.split("x", 1)
        alone = settings(data_root=data, frames=int(frames), size=size, shards=tmp_path / bucket)
        single = CacheReader(encode_all(alone).shards)
        rows = {row.source: row for row in single.samples}
        for row in (row for row in reader.samples if str(row.bucket) == bucket):
            assert row == rows[row.source]  # keys, too
            same = single.read("latents", row.latents)
            assert torch.equal(
                reader.read("latents", row.latents).tensors["moments"], same.tensors["moments"]
            )
    capsys.readouterr()
    assert run(["verify", str(shards)]) == 0
    before = files(shards)
    (shards / "cache.json").unlink()
    assert run(["verify", str(shards), "--repair"]) == 0
    assert files(shards) == before
    assert run(["verify", str(shards), "--decode", "100%", "--device", "cpu"]) == 0
    assert run(["export", str(shards), str(tmp_path / "part"), "--bucket", TALL]) == 0
    assert places(tmp_path / "part") == {"tall.mp4": TALL}
    assert run(["export", str(shards), str(tmp_path / "rest"), "--bucket", SHORT]) == 0
    assert run(["merge", str(tmp_path / "joined"), str(tmp_path / "part"), str(tmp_path / "rest")]) == 0
    assert json.loads((tmp_path / "joined" / "cache.json").read_text())["buckets"] == [SHORT, TALL]


def test_a_bucket_is_never_left_out_and_may_be_added(several: Settings, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    encode_all(several(bucket=[SHORT, TALL]))
    assert places(shards) == {**PLACES, "long.mp4": SHORT, "other.mp4": SHORT}
    before = files(shards)
    for call in (encode_all, plan_run):
        with pytest.raises(MismatchError) as caught:
            call(several(bucket=[TALL, LONG]))
        assert caught.value.differences == {"buckets": (f"{SHORT} {TALL}", f"{LONG} {TALL}")}
        assert f"--bucket {SHORT} --bucket {LONG} --bucket {TALL}" in caught.value.hint
    assert files(shards) == before

    plan = plan_run(several())
    whys = {change.source: change.why for change in plan.changes}
    assert whys["long.mp4"] == whys["other.mp4"] == f"moved from bucket {SHORT} to {LONG}"
    assert whys.keys() == {"long.mp4", "other.mp4", "tiny.mp4", "broken.mp4"}
    assert plan.entries["latents"] == 4
    done = encode_all(several())
    assert (done.encoded, done.captions, len(done.failures)) == (2, 0, 2)
    assert places(shards) == PLACES
    assert {name for name in files(shards) if name.startswith("latents") and name.endswith("tar")} == {
        f"latents/latents-{bucket}-00000.tar" for bucket in (SHORT, LONG, TALL)
    }


def test_auto_is_decided_once(
    several: Settings, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(4):
        for source in ("long", "tall"):
            shutil.copy(data / f"{source}.mp4", root / f"{source}{number}.mp4")
            (root / f"{source}{number}.txt").write_text("a caption")
    config = several(data_root=root, bucket="auto")
    assert encode_all(config.model_copy(update={"dry_run": True})).encoded == 0
    assert not (tmp_path / "shards").exists()
    encode_all(config)
    decided = [f"17x{size}" for size in ("64x112", "112x64")]
    said = capsys.readouterr().err
    assert f"--bucket auto takes {' '.join(decided)}" in said
    saved = load_config(EncodeConfig, {}, tmp_path / "shards" / "encode.config.yaml")
    assert (saved.bucket, saved.frames, saved.size) == (decided, None, None)
    for number in range(5):
        shutil.copy(data / "short.mp4", root / f"short{number}.mp4")
        (root / f"short{number}.txt").write_text("a caption")
    again = encode_all(config)
    assert f"keeps the buckets of this cache: {' '.join(decided)}." in capsys.readouterr().err
    assert (again.encoded, len(again.failures)) == (0, 5)  # which --bucket 9x64x112 would take
    assert decide(saved).buckets == decide(config).buckets


def test_a_video_is_looked_at_once(several: Settings, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    plan_run(several())
    looked: list[str] = []
    real = shapes.probe
    monkeypatch.setattr(shapes, "probe", lambda path: looked.append(path.name) or real(path))
    plan_run(several(fps="8"))
    assert set(looked) <= {"broken.mp4"}
    (data / "long.mp4").touch()
    plan_run(several())
    assert set(looked) - {"broken.mp4"} == {"long.mp4"}


def test_a_single_bucket_looks_at_nothing(several: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(shapes, "probe")
    for changes in ({"bucket": [SHORT]}, {"bucket": [], "frames": 9, "size": "32x48"}):
        assert plan_run(several(**changes)).entries["latents"] == 6


def test_image_conditions_have_the_size_of_their_clip(several: Settings, data: Path, tmp_path: Path) -> None:
    """A listed picture, too; and pictures for validation that of the first bucket."""
    Image.fromarray(picture(3)).save(tmp_path / "first.png")
    root = tmp_path / "data"
    root.mkdir()
    listed = [{"file_name": name, "text": "a caption"} for name in PLACES]
    for row in listed[:2] + listed[3:]:
        row["image"] = "first.png"
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    for path in [*(data / name for name in PLACES), tmp_path / "first.png"]:
        shutil.copy(path, root)
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    (tmp_path / "images.txt").write_text("first.png\n")
    config = several(
        "1.5-5b-i2v",
        data_root=root,
        bucket=[TALL, LONG, SHORT],
        image_draws=2,
        validation_prompts=tmp_path / "prompts.txt",
        validation_images=tmp_path / "images.txt",
    )
    encode_all(config)
    reader = CacheReader(tmp_path / "shards")
    assert places(reader.root) == PLACES
    for row in reader.samples:
        for key in row.images:
            entry = reader.read("images", key)
            assert entry.tensors["latents"].shape[-2:] == (row.height // 8, row.width // 8)
            assert entry.facts["size"] == str(row.bucket.size)
            assert entry.facts["image"].startswith("clip" if row.source == "short.mp4" else "file")
    assert {shard.name for shard in reader.manifest.series["images"].shards} == {
        "images-32x48-00000",
        "images-48x32-00000",
    }
    (prompt,) = reader.validation
    assert prompt.image
    assert reader.read("images", prompt.image).facts["size"] == "48x32"
    assert run(["verify", str(reader.root)]) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 9}, "takes the place of --frames and --size"),
        ({"size": "32x48"}, "takes the place of --frames and --size"),
        ({"bucket": ["auto", SHORT]}, "stands alone"),
        ({"bucket": ["9x32"]}, "'9x32' is not a bucket"),
        ({"bucket": [SHORT, "10x32x48"]}, "10 frames cannot be encoded"),
        ({"bucket": [SHORT, "9x32x50"]}, "32x50 cannot be encoded"),
        ({"bucket": [SHORT, "9x64x96"], "family": "5b-i2v"}, "learned positions"),
    ],
)
def test_what_is_refused(
    several: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    family = changes.pop("family", "5b")
    values = several(family).model_dump(mode="json", exclude_unset=True, exclude_none=True) | changes
    values.pop("bucket")
    flags = [f"--bucket={bucket}" for bucket in changes.get("bucket", [SHORT])]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    assert run(["encode", *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


def test_yaml_takes_a_list_or_one_word(tmp_path: Path) -> None:
    for text, expected in (("auto", ["auto"]), ("[9x32x48, 17x32x48]", [SHORT, LONG]), ("9x32x48", [SHORT])):
        (tmp_path / "settings.yaml").write_text(f"data_root: x\nmodel: y\nbucket: {text}\n")
        assert load_config(EncodeConfig, {}, tmp_path / "settings.yaml").bucket == expected
    with pytest.raises(ConfigError, match="--bucket"):
        load_config(EncodeConfig, {"data_root": "x", "model": "y", "bucket": 3})
