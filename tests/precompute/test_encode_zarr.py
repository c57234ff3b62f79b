"""``--format zarr`` from videos to training, and the commands that know formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogcache.cache.format import LATENTS, TEXT
from cogcache.cache.reader import CacheReader
from cogcache.cli import run
from cogcache.config import EncodeConfig
from cogcache.errors import MismatchError
from cogcache.precompute.encode import encode_all


def same(first: Path, second: Path) -> None:
    """Equal rows, and equal entries bit for bit."""
    one, other = CacheReader(first), CacheReader(second)
    assert one.samples == other.samples
    for series in (LATENTS, TEXT):
        groups = [{name: sorted(keys) for name, keys in r.groups(series).items()} for r in (one, other)]
        assert groups[0] == groups[1]
        assert all(one.contents(series, key) == other.contents(series, key) for key in one.keys(series))


def test_both_formats_hold_the_same(
    settings: Callable[..., EncodeConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = settings(size="16x32", shards=tmp_path / "tar")
    arrays = settings(size="16x32", shards=tmp_path / "zarr", format="zarr")
    encode_all(tar)
    encode_all(arrays)
    assert CacheReader(tmp_path / "zarr").manifest.backend == "zarr"
    same(tmp_path / "tar", tmp_path / "zarr")
    again = encode_all(settings(size="16x32", shards=tmp_path / "zarr"))  # keeps its own format
    assert again.encoded == 0
    with pytest.raises(MismatchError) as caught:
        encode_all(settings(size="16x32", shards=tmp_path / "zarr", format="webdataset"))
    assert caught.value.differences == {"backend": ("zarr", "webdataset")}
    assert "cogcache export --format" in str(caught.value.hint)
    assert run(["verify", str(tmp_path / "zarr"), "--decode", "2", "--device", "cpu"]) == 0
    assert run(["inspect", str(tmp_path / "zarr")]) == 0
    back = ["export", str(tmp_path / "zarr"), str(tmp_path / "back"), "--format", "webdataset"]
    assert run(back) == 0
    assert CacheReader(tmp_path / "back").manifest.backend == "webdataset"
    same(tmp_path / "tar", tmp_path / "back")
    merge = ["merge", str(tmp_path / "both"), str(tmp_path / "tar"), str(tmp_path / "zarr")]
    capsys.readouterr()
    assert run(merge) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "backend: was 'webdataset', is 'zarr'" in told
    assert "--format" in told
    assert run([*merge, "--format", "zarr", "--zarr-compression", "none"]) == 0
    same(tmp_path / "tar", tmp_path / "both")


def test_compression_changes_no_value(settings: Callable[..., EncodeConfig], tmp_path: Path) -> None:
    sizes = {}
    for compression in ("zstd", "none"):
        root = tmp_path / compression
        encode_all(settings(size="16x32", shards=root, format="zarr", zarr_compression=compression))
        sizes[compression] = sum(path.stat().st_size for path in root.glob(f"{LATENTS}/*/c.*"))
    same(tmp_path / "zstd", tmp_path / "none")
    assert sizes["zstd"] < sizes["none"]
    reader = CacheReader(tmp_path / "zstd")
    key = reader.samples[0].latents
    assert torch.isfinite(reader.read(LATENTS, key).tensors["moments"]).all()
