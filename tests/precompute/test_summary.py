"""What ``encode`` tells when it is done."""

from pathlib import Path

import pytest

from cogcache.config import EncodeConfig
from cogcache.location import Url
from cogcache.precompute.encode import EncodeResult, encode


@pytest.mark.parametrize(
    ("shards", "expected"), [(Url("s3://bucket/clips"), "s3://bucket/clips"), (Path("clips"), "clips")]
)
def test_the_cache_is_named_as_it_was_given(
    shards: Url | Path,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path("staging") if isinstance(shards, Url) else shards
    result = EncodeResult(folder, None, 1, 1, 2, [])
    monkeypatch.setitem(encode.__globals__, "encode_all", lambda _: result)
    encode(EncodeConfig(data_root=Path("data"), model="model", shards=shards))
    told = capsys.readouterr().err
    assert told == f"{expected}: 1 clip ready, 0 failed. Encoded now: 1 latent, 2 captions.\n"


def test_what_was_not_read_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = EncodeResult(Path("clips"), None, 3, 2, 0, [])
    monkeypatch.setitem(encode.__globals__, "encode_all", lambda _: result)
    encode(EncodeConfig(data_root=Path("data"), model="model", shards=Path("clips")))
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("clips: 3 clips ready, 0 failed. Encoded now: 2 latents, 0 captions.")
    assert "not read again: 'cogcache verify clips' reads every byte." in told
