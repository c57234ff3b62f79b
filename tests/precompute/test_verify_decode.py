"""verify --decode finds what checksums cannot: latents that are not those of their clips."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogcache.cache.format import LATENTS, Entry
from cogcache.cache.reader import CacheReader
from cogcache.cache.shard import ShardWriter
from cogcache.cli import run
from cogcache.config import EncodeConfig
from cogcache.errors import ConfigError
from cogcache.precompute import encode_all, vae
from cogcache.precompute.redo import TOLERANCES, latent_error, parse_share, pick
from cogcache.precompute.vae import to_pixels


def test_image_to_video_cache_is_whole(
    settings: Callable[..., EncodeConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every entry that encode writes is what verify expects, the image bank too; lost files come back."""
    config = settings("5b-i2v", size=None, frames=None, short="pad", fps="native", image_draws=2)
    encode_all(config)
    assert config.shards
    before = {
        path: path.read_bytes()
        for path in config.shards.rglob("*")
        if path.is_file() and path.name != "journal.jsonl"
    }
    assert run(["verify", str(config.shards)]) == 0
    for name in ("cache.json", "manifest.json", "images/images-64x96-00000.index.jsonl"):
        (config.shards / name).unlink()
    assert run(["verify", str(config.shards), "--repair"]) == 0
    assert "the journal proves it" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_latents(
    settings: Callable[..., EncodeConfig], capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    config = settings(vae_dtype=dtype, size="16x32")
    encode_all(config)
    assert config.shards
    capsys.readouterr()
    assert run(["verify", str(config.shards), "--decode", "25%", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len({row["source"] for row in report["decoded"]}) == 2
    assert all(row["latent_error"] < TOLERANCES[dtype] / 10 for row in report["decoded"])
    assert all(3 < row["psnr_db"] < 60 for row in report["decoded"])
    reader = CacheReader(config.shards)
    latents = [reader.read(LATENTS, row.latents).tensors["moments"] for row in reader.samples]
    apart = [latent_error(a, b) for n, a in enumerate(latents) for b in latents[:n]]
    assert min(apart) > TOLERANCES[dtype]  # or a swapped entry would not be seen


def test_entry_of_another_clip(
    settings: Callable[..., EncodeConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two entries swapped when they were written: every checksum is right."""
    config, held = settings(size="16x32"), list[Entry]()
    append = ShardWriter.append

    def swapped(self: ShardWriter, entry: Entry) -> None:
        held.append(entry)
        tensors = held[1].tensors if len(held) == 3 else entry.tensors
        append(self, Entry(entry.key, tensors, entry.facts))

    monkeypatch.setattr(ShardWriter, "append", swapped)
    encode_all(config)
    assert config.shards
    wrong = str(held[2].facts["source"])
    assert run(["verify", str(config.shards)]) == 0
    capsys.readouterr()
    assert run(["verify", str(config.shards), "--decode", "8", "--device", "cpu"]) == 5
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged")]
    assert "not that of its clip" in line
    assert wrong in line
    monkeypatch.undo()
    assert run(["verify", str(config.shards), "--decode", "8", "--device", "cpu", "--repair"]) == 3
    assert encode_all(config).encoded == 1
    mended = CacheReader(config.shards).read(LATENTS, held[2].key).tensors["moments"]
    assert torch.equal(mended, held[2].tensors["moments"])


def test_wrong_encoder(
    settings: Callable[..., EncodeConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An encoder that forgets to scale pixels to -1..1."""
    config = settings(size="16x32")
    monkeypatch.setattr(vae, "to_pixels", lambda frames: to_pixels(frames).add(1).div(2))
    encode_all(config)
    monkeypatch.undo()
    assert run(["verify", str(config.shards)]) == 0
    assert run(["verify", str(config.shards), "--decode", "2", "--device", "cpu"]) == 5
    assert "2 damages" in capsys.readouterr().err


def test_changed_gone_or_moved_videos(
    settings: Callable[..., EncodeConfig],
    clips_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = Path(shutil.copytree(clips_root, tmp_path / "data"))
    config = settings(data_root=data, size="16x32")
    encode_all(config)
    data.rename(tmp_path / "moved")
    (tmp_path / "moved" / "2.mp4").write_bytes((tmp_path / "moved" / "3.mp4").read_bytes())
    capsys.readouterr()
    command = ["verify", str(config.shards), "--decode", "100%", "--device", "cpu"]
    assert run(command) == 2
    assert run([*command, "--data-root", str(tmp_path / "moved")]) == 0
    told = capsys.readouterr().out
    assert "2.mp4: not the file that was encoded" in told
    assert told.count("decoded ") == 7


def test_other_weights_are_refused(
    settings: Callable[..., EncodeConfig],
    tiny_models: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    config = settings(model=str(model), size="16x32")
    encode_all(config)
    weights = next((model / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    assert run(["verify", str(config.shards), "--decode", "1", "--device", "cpu"]) == 2
    assert "vae_weights: was" in capsys.readouterr().err


def test_share() -> None:
    assert parse_share("1%") == (0.01, True)
    assert parse_share("20") == (20, False)
    for wrong in ("0%", "101%", "0", "1.5", "some", "", "nan", "inf", "nan%"):
        with pytest.raises(ConfigError):
            parse_share(wrong)


def test_pick_is_deterministic(settings: Callable[..., EncodeConfig]) -> None:
    config = settings(size="16x32")
    encode_all(config)
    assert config.shards
    rows = CacheReader(config.shards).samples
    assert pick(rows, "3") == pick(rows[::-1], "3")
    assert len(pick(rows, "1%")) == 1
    assert len(pick(rows, "100%")) == len(pick(rows, "99")) == 8


def test_latent_error() -> None:
    a = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert latent_error(a, a) == 0
    assert latent_error(a * 1.01, a) == pytest.approx(0.01, rel=1e-3)
    assert latent_error(a[:, :2], a) == float("inf")
