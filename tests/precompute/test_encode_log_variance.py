"""``encode --log-variance 8bit``, in tar and in zarr shards: what is stored, what is refused, what verify makes of it.

Mutations tried, each caught: fingerprint without the field; float32 accepted; verify without slack; slack for
the means.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making_caches import write_cache

from cogcache.cache.format import LATENTS
from cogcache.cache.moments import LOGVAR_SLACK, pack_moments, unpack_moments
from cogcache.cache.reader import CacheReader
from cogcache.cli import run
from cogcache.config import EncodeConfig
from cogcache.errors import ConfigError, DamagedCacheError, MismatchError
from cogcache.geometry import Size
from cogcache.precompute import encode_all
from cogcache.precompute.redo import latent_error
from cogcache.precompute.settings import decide
from cogcache.tiny import Family

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import read_shards

EIGHT = {"log_variance": "8bit", "size": "16x32"}


@pytest.mark.parametrize(("form", "dtype"), [("webdataset", "bfloat16"), ("zarr", "float16")])
def test_means_are_the_same_and_the_cache_is_whole(
    settings: Callable[..., EncodeConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    form: str,
    dtype: str,
) -> None:
    full = settings(vae_dtype=dtype, size="16x32", shards=tmp_path / "full")
    eight = settings(vae_dtype=dtype, shards=tmp_path / "eight", format=form, **EIGHT)
    encode_all(full)
    encode_all(eight)
    a, b = CacheReader(tmp_path / "full"), CacheReader(tmp_path / "eight")
    for old, new in zip(a.samples, b.samples, strict=True):
        assert new.latents != old.latents
        (name,) = b.read(LATENTS, new.latents).tensors
        assert name == "moments_8bit"
        was, now = a.moments(old.latents), b.moments(new.latents)
        assert was.dtype == getattr(torch, dtype)
        (mean, logvar), (same, near) = was.float().chunk(2), now.chunk(2)
        assert torch.equal(mean, same)
        assert 0 < (logvar - near).abs().max() <= LOGVAR_SLACK + 4e-6
    capsys.readouterr()
    assert run(["verify", str(tmp_path / "eight"), "--decode", "2", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["latent_error"] < 1e-5 for row in report["decoded"]] == [True, True]
    assert run(["inspect", str(tmp_path / "eight"), "--json"]) == 0


def test_one_cache_has_one_form(settings: Callable[..., EncodeConfig]) -> None:
    config = settings(vae_dtype="bfloat16", **EIGHT)
    encode_all(config)
    assert decide(config).identity().series[LATENTS]["log_variance"] == "8bit"
    with pytest.raises(MismatchError, match=r"log_variance: was '?8bit'?, is '?full'?"):
        encode_all(config.model_copy(update={"log_variance": "full"}))


def test_a_vae_of_32_bits_is_refused(settings: Callable[..., EncodeConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would be float32") as caught:
        encode_all(settings(**EIGHT))
    assert "--vae-dtype bfloat16" in str(caught.value)
    assert not (tmp_path / "shards").exists()


def test_slack_is_for_rounding_alone() -> None:
    source = torch.Generator().manual_seed(0)
    again = torch.randn(8, 3, 4, 4, generator=source).bfloat16()
    stored = unpack_moments(pack_moments(again), "bfloat16")
    assert latent_error(stored, again) > 0.03
    assert latent_error(stored, again, LOGVAR_SLACK) < 1e-5
    for channel, by in ((0, 0.9 * LOGVAR_SLACK), (4, 3 * LOGVAR_SLACK)):  # a mean, a log-variance
        other = stored.clone()
        other[channel] += by
        assert latent_error(other, again, LOGVAR_SLACK) > 0.03
    clamped = torch.cat([again[:4].float(), torch.full((4, 3, 4, 4), -35.0)])
    assert latent_error(unpack_moments(pack_moments(clamped.half()), "float16"), clamped.half(), 0.1) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numpy_reads_the_same(tiny_models: Callable[[Family], Path], tmp_path: Path, dtype: str) -> None:
    clips = [(9, Size(32, 48)), (17, Size(48, 32))]
    root = write_cache(tmp_path / "cache", tiny_models("5b"), clips, dtype=dtype, packed=True)
    full = write_cache(tmp_path / "full", tiny_models("5b"), clips, dtype=dtype)
    real, before = CacheReader(root), CacheReader(full)
    rows = list(read_shards.Shards(root))
    assert len(rows) == 2
    for (row, moments, _), old in zip(rows, before.samples, strict=True):
        assert moments.dtype == np.float32
        assert np.array_equal(moments, real.moments(row["latents"]).numpy())
        assert np.array_equal(
            moments.reshape(2, -1)[0], before.moments(old.latents).float().numpy().reshape(2, -1)[0]
        )


def test_an_entry_without_moments_is_named(tiny_models: Callable[[Family], Path], tmp_path: Path) -> None:
    root = write_cache(
        tmp_path / "cache", tiny_models("5b"), [(9, Size(32, 48))], dtype="bfloat16", packed=True
    )
    reader = CacheReader(root)
    prints: dict[str, Any] = reader.manifest.series[LATENTS].fingerprint
    prints["vae_dtype"] = "float32"
    with pytest.raises(DamagedCacheError, match="16 bits"):
        reader.moments(reader.samples[0].latents)
