"""What inspect tells is what is there."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from inspect_kit import CAPTIONS, EVIL, OUTLIER

from cogcache.cache.reader import CacheReader
from cogcache.cli import run
from cogcache.inspect import inspect_shards
from cogcache.inspect.statistics import LatentStatistics, pooled, robust_z


def test_the_table_tells_it_all(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(shards), "--latents"]) == 0
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    for line in (
        "clips 8, 3 failed",
        "bucket 7 x 9 x 32x48 @ 8 fps",
        "bucket 1 x 9 x 48x32 @ 8 fps",
        "failure 2 x too short",
        "reader 8 x pyav",
        "codec 8 x h264",
        "latents.vae_dtype float32",
        "durations 0.50 to 7.50 s, median 4.50 s, 32 s together",
        f"captions 7 different, 2 clips share one; longest {len(EVIL)} characters, 5 words",
    ):
        assert line in lines, said
    assert next(line for line in lines if line.startswith("outlier")).startswith(
        f"outlier clips/{OUTLIER}.mp4"
    )
    assert "\x1b" not in said


def test_json_holds_every_clip_and_nothing_else_is_printed(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(shards), "--json", "--latents"]) == 0
    found = json.loads(capsys.readouterr().out)
    reader = CacheReader(shards)
    assert [clip["caption"] for clip in found["samples"]] == CAPTIONS
    assert found["fingerprint"] == reader.manifest.checksum
    assert found["outliers"] == [f"{OUTLIER:016x}"]
    assert found["series"]["latents"]["bytes"] == sum(
        p.stat().st_size for p in (shards / "latents").glob("*.tar")
    )
    assert found["reasons"] == {"too short": 2, EVIL: 1}
    flags = {clip["source"]: clip["flags"] for clip in found["samples"] if clip["flags"]}
    assert flags == {
        "clips/0.mp4": ["duplicate caption"],
        "clips/1.mp4": ["duplicate caption"],
        "clips/4.mp4": ["padded"],
        f"clips/{OUTLIER}.mp4": ["outlier"],
    }
    means = [reader.read("latents", row.latents).tensors["moments"].chunk(2)[0] for row in reader.samples]
    assert found["samples"][2]["mean"] == pytest.approx(float(means[2].mean()), abs=1e-6)
    assert found["samples"][2]["std"] == pytest.approx(float(means[2].std(correction=0)), abs=1e-6)
    everything = np.concatenate([mean.numpy().ravel() for mean in means])
    assert found["latents"] == pytest.approx({"mean": everything.mean(), "std": everything.std()}, abs=1e-5)


def test_without_latents_no_tensor_is_read(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damage in a tensor goes unseen, damage in facts does not."""
    root = shutil.copytree(shards, tmp_path / "shards")
    tar = root / "latents" / "latents-00000.tar"
    row = json.loads((root / "latents" / "latents-00000.index.jsonl").read_bytes().splitlines()[0])
    tensors, facts = row["members"]
    good = tar.read_bytes()
    for member, code in ((tensors, 0), (facts, 2)):
        bad = bytearray(good)
        bad[member["offset"] + member["size"] // 2] ^= 1
        tar.write_bytes(bad)
        assert run(["inspect", str(root), "--json"]) == code
    assert "checksum" in capsys.readouterr().err
    tar.write_bytes(good)
    assert inspect_shards(root)["latents"] is None


def test_robust_z_is_not_moved_by_what_it_looks_for() -> None:
    values = [*np.random.default_rng(0).normal(3, 2, 999), 1e6]
    scores = robust_z(values)
    assert scores[-1] > 1e5
    assert np.mean(scores[:-1] > 3) < 0.01
    assert scores[0] == pytest.approx(abs(values[0] - 3) / 2, abs=0.2)


def test_robust_z_at_its_edges() -> None:
    assert list(robust_z([1, 2, 50])) == [0, 0, 0]
    assert list(robust_z([1.0] * 6)) == [0] * 6
    assert list(robust_z([1.0] * 6 + [2.0])) == [0] * 6 + [math.inf]
    assert list(robust_z([1.0, 2, 3, 4, math.nan]))[-1] == math.inf
    assert list(robust_z([])) == []


def test_pooled_is_over_all_values() -> None:
    parts = [np.arange(5.0), np.array([10.0, 30.0])]
    found = pooled([LatentStatistics(float(p.mean()), float(p.std()), p.size) for p in parts])
    whole = np.concatenate(parts)
    assert found == pytest.approx((whole.mean(), whole.std()))
    assert pooled([LatentStatistics(math.nan, 1.0, 4)]) is None
