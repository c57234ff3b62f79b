"""The bench commands measure what they say; how fast is nobody's business here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cogcache.bench.random_cache import random_cache, real_variant
from cogcache.cache.reader import CacheReader
from cogcache.cli import app, run


def test_load_writes_every_row_with_its_share_of_raw(tmp_path: Path) -> None:
    out = tmp_path / "figures" / "load.json"
    words = ["bench", "load", "--clips", "3", "--workers", "1,2", "--work", str(tmp_path), "--json", str(out)]
    done = CliRunner().invoke(app, [*words, "--repeats", "1", "--steps", "4"])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    rows = {(r["way"], r["order"], r["cold"], r["workers"]) for r in found["reads"]}
    ways = {way for way, *_ in rows}
    assert {"raw", "safetensors", "webdataset"} <= ways
    assert len(rows) == len(found["reads"]) == len(ways) * 2 * 2 * 2
    sample_mb = (2 * 16 * 13 * 60 * 90 + 226 * 4096) * 2 / 1e6
    for row in found["reads"]:
        assert row["mb_per_s"] / row["samples_per_s"] == pytest.approx(sample_mb, rel=1e-3)
        assert row["way"] != "raw" or row["share_of_raw"] == 1
    assert [wait["workers"] for wait in found["waiting"]["webdataset"]] == [1, 2]
    assert found["facts"]["cores"] >= 1
    assert found["facts"]["versions"]["torch"]


def test_random_cache_holds_real_shapes(tmp_path: Path) -> None:
    reader = CacheReader(random_cache(tmp_path / "cache", "1.5-5b", 2, real_variant("1.5-5b")))
    row = reader.samples[1]
    assert reader.read("latents", row.latents).tensors["moments"].shape == (32, 21, 96, 170)
    assert reader.read("text", row.text).tensors["prompt_embeds"].shape == (224, 4096)


@pytest.mark.parametrize("workers", ["", "0", "two", "1,,2"])
def test_workers_must_be_numbers(workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "load", "--workers", workers, "--work", str(tmp_path)]) == 2
    assert "--workers" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
