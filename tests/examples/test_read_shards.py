"""The stand-alone reader agrees with the real one, needs nothing but numpy, and refuses what is damaged."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making_caches import write_cache

from cogcache.cache.format import canonical_json
from cogcache.cache.lines import dump_sealed
from cogcache.cache.reader import CacheReader
from cogcache.geometry import Size
from cogcache.tiny import Family

SCRIPT = Path(__file__).parents[2] / "examples" / "read_shards.py"
sys.path.insert(0, str(SCRIPT.parent))
import read_shards  # noqa: E402

CLIPS = [(9, Size(32, 48)), (17, Size(48, 32)), (9, Size(32, 48))]


@pytest.fixture(scope="module")
def make(
    tiny_models: Callable[[Family], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    def make(family: Family, **options: Any) -> Path:
        return write_cache(tmp_path_factory.mktemp("cache") / "shards", tiny_models(family), CLIPS, **options)

    return make


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["2b", "1.5-5b-i2v"])
def test_it_reads_what_the_real_reader_reads(make: Callable[..., Path], family: Family, dtype: str) -> None:
    root = make(family, dtype=dtype, prompts=2)
    real, shards = CacheReader(root), read_shards.Shards(root)
    read = list(shards)
    assert [row for row, _, _ in read] == [row.model_dump(mode="json") for row in real.samples]
    for row, moments, embeds in read:
        assert moments.dtype == embeds.dtype == np.float32
        assert np.array_equal(
            moments, real.read("latents", row["latents"]).tensors["moments"].float().numpy()
        )
        assert np.array_equal(embeds, real.read("text", row["text"]).tensors["prompt_embeds"].float().numpy())
    for series in shards.places:
        assert list(shards.places[series]) == real.keys(series)
        for key in real.keys(series):
            tensors, facts = shards.read(series, key)
            assert facts == real.read(series, key).facts
            assert tensors.keys() == real.read(series, key).tensors.keys()
    assert [row["prompt"] for row in shards.validation] == ["prompt 0", "prompt 1"]


def test_it_is_short_and_stands_alone(make: Callable[..., Path], tmp_path: Path) -> None:
    source = SCRIPT.read_text("utf-8")
    assert len(source.splitlines()) < 100
    names = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {str(node.module) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {"numpy"}
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", str(SCRIPT), str(make("5b"))],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.count("(32, 3, 4, 6)") == 2, done.stdout


FLIPPED = [
    "manifest.json",
    "samples.jsonl",
    "latents/latents-9x32x48-00000.index.jsonl",
    "text/text-226-00000.index.jsonl",
]


@pytest.mark.parametrize("name", FLIPPED)
def test_no_byte_of_what_it_believes_can_change(make: Callable[..., Path], tmp_path: Path, name: str) -> None:
    root = shutil.copytree(make("5b"), tmp_path / "cache")
    path = root / name
    good = path.read_bytes()
    for place in range(0, len(good), max(len(good) // 60, 1)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with pytest.raises((ValueError, KeyError)):
            read_shards.Shards(root)


def test_a_flipped_bit_or_a_cut_in_a_shard_is_found(make: Callable[..., Path], tmp_path: Path) -> None:
    root = shutil.copytree(make("5b"), tmp_path / "cache")
    shards = read_shards.Shards(root)
    key = shards.samples[0]["latents"]
    tar, offset, size, _ = shards.places["latents"][key][0]
    data = bytearray(tar.read_bytes())
    data[offset + size // 2] ^= 4
    tar.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        shards.read("latents", key)
    tar.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="another size"):
        read_shards.Shards(root)


def test_it_takes_a_table_that_waits_for_its_rename(make: Callable[..., Path], tmp_path: Path) -> None:
    root = shutil.copytree(make("5b"), tmp_path / "cache")
    (root / "samples.jsonl").rename(root / "samples.jsonl.next")
    (root / "samples.jsonl").write_bytes(b"old\n")
    assert len(read_shards.Shards(root).samples) == len(CLIPS)


def forge(root: Path, field: str, value: object) -> None:
    """Change a field of the first sample, and make table and manifest agree with it."""
    rows = [json.loads(line) for line in (root / "samples.jsonl").read_bytes().splitlines()]
    rows[0][field] = value
    data = "".join(canonical_json(row) + "\n" for row in rows).encode()
    (root / "samples.jsonl").write_bytes(data)
    manifest = json.loads((root / "manifest.json").read_bytes())
    del manifest["checksum"]
    manifest["tables"]["samples.jsonl"]["sha256"] = hashlib.sha256(data).hexdigest()
    (root / "manifest.json").write_bytes(dump_sealed(manifest))


@pytest.mark.parametrize("field", ["text", "latents", "images"])
def test_every_entry_that_a_sample_names_must_be_there(
    make: Callable[..., Path], tmp_path: Path, field: str
) -> None:
    root = shutil.copytree(make("5b"), tmp_path / "cache")
    forge(root, field, ["0" * 32] if field == "images" else "0" * 32)
    with pytest.raises(ValueError, match="missing entry"):
        read_shards.Shards(root)
