"""Reading caches from real servers."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from servers import Place, requests

from cogcache.cache.format import LATENTS
from cogcache.cache.reader import CacheReader
from cogcache.cache.remote import patience
from cogcache.cache.remote.connection import Connection
from cogcache.cache.remote.storage import RemoteOptions
from cogcache.cli import run
from cogcache.config import TrainConfig
from cogcache.errors import CacheError, DamagedCacheError
from cogcache.location import Url
from cogcache.train import train

BRIEF = RemoteOptions(patience=0.5)


def everything(reader: CacheReader) -> list[tuple[bytes, ...]]:
    """All entries as they are stored."""
    return [
        tuple(reader.contents(series, key)) for series in ("latents", "text") for key in reader.keys(series)
    ]


def fetches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every range that is asked for from now on."""
    asked: list[tuple[str, int, int]] = []
    fetch = Connection.fetch

    def noted(self: Connection, name: str, start: int, size: int) -> bytes:
        asked.append((name, start, size))
        return fetch(self, name, start, size)

    monkeypatch.setattr(Connection, "fetch", noted)
    return asked


@pytest.mark.parametrize("made", ["cache", "zarr_cache"])
@pytest.mark.parametrize("kind", ["s3", "gs", "hf", "nginx", "https", "memory"])
def test_a_url_reads_as_the_folder(
    kind: str, made: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache: Path = request.getfixturevalue(made)
    if kind == "memory":
        import fsspec

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        url = f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").put(f"{cache}/", f"/{tmp_path.name}", recursive=True)
    else:
        url = request.getfixturevalue(kind).publish(cache)
    local, asked = CacheReader(cache), fetches(monkeypatch)
    reader = CacheReader(url)
    assert (reader.manifest, reader.samples, reader.failures) == (
        local.manifest,
        local.samples,
        local.failures,
    )
    assert everything(reader) == everything(local)
    assert len(asked) == len(everything(local))  # both members of an entry in one request
    assert everything(pickle.loads(pickle.dumps(reader))) == everything(local)  # noqa: S301
    assert everything(CacheReader(url)) == everything(local)
    assert len(asked) == len(everything(local))  # the rest came from this machine
    assert reader.damages() == []


def settings(tmp_path: Path, shards: object, name: str, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "shards": shards,
        "output": tmp_path / name,
        "steps": 9,
        "rank": 2,
        "alpha": 1.0,
        "lr": 1e-2,
        "checkpoint_every": 0,
        "device": "cpu",
        "gradient_checkpointing": False,
    }
    return TrainConfig(**{**values, **changes})


def outcome(config: TrainConfig) -> tuple[list[dict[str, Any]], bytes]:
    """Losses and samples of every step, and the tensors of the LoRA."""
    result = train(config)
    lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in line.items() if k != "seconds" and not k.endswith("_s")} for line in lines]
    lora = load_file(result.lora)
    return rows, b"".join(lora[name].numpy().tobytes() for name in sorted(lora))


@pytest.mark.parametrize("kind", ["s3", "gs", "hf", "https"])
def test_training_from_a_url_equals_training_from_the_folder_whatever_happens_to_the_server(
    kind: str, request: pytest.FixtureRequest, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the second epoch, back once the reader has said that it waits."""
    place: Place = request.getfixturevalue(kind)
    url, said = place.publish(cache), []
    expected = outcome(settings(tmp_path, cache, "local"))
    fetch, count = Connection.fetch, 0

    def killing(self: Connection, name: str, start: int, size: int) -> bytes:
        nonlocal count
        count += 1
        if count == 15:
            place.server.kill()
        return fetch(self, name, start, size)

    def heard(text: str) -> None:
        said.append(text)
        if "Waiting" in text:
            place.server.start()

    monkeypatch.setattr(Connection, "fetch", killing)
    monkeypatch.setattr(patience, "say", heard)
    found = outcome(settings(tmp_path, url, "remote", remote_cache_size=0, workers=2))
    assert found == expected
    assert len(expected[0]) == 9
    assert count > 15
    assert [re.sub(r"\(.*\)", "()", re.sub(r"\d+ s", "N s", text)) for text in said] == [
        f"{url} does not answer (). Waiting for it, up to N s.",
        f"{url} answers again after N s; going on.",
    ]


def test_training_from_zarr_at_a_url_equals_training_from_tar_files(
    s3: Place, cache: Path, zarr_cache: Path, tmp_path: Path
) -> None:
    url = s3.publish(zarr_cache)
    tar = settings(tmp_path, cache, "tar", steps=3)
    assert outcome(settings(tmp_path, Url(url), "zarr", steps=3)) == outcome(tar)


def test_a_run_is_resumed_wherever_its_shards_are(s3: Place, cache: Path, tmp_path: Path) -> None:
    url = s3.publish(cache)
    expected = outcome(settings(tmp_path, cache, "whole"))
    train(settings(tmp_path, cache, "run", steps=4, checkpoint_every=2))
    again = settings(tmp_path, url, "run", resume="latest", checkpoint_every=2)
    assert outcome(again)[1] == expected[1]
    assert f"shards: {url}\n" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            r"no credentials for s3://\S+: .*AWS_ACCESS_KEY_ID",
        ),
        ({"AWS_SECRET_ACCESS_KEY": "other"}, r"no access to s3://\S+: .*aws configure.*AWS_ENDPOINT_URL"),
        ({"AWS_ACCESS_KEY_ID": "other"}, r"no access to s3://\S+: "),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, r"has not answered for \d s: "),
    ],
    ids=["none", "secret", "id", "nobody there"],
)
def test_s3_refusals(
    s3: Place, cache: Path, change: dict[str, str | None], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.publish(cache)
    for name, value in change.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(CacheError, match=expected):
        CacheReader(url, BRIEF)


def test_nothing_there(s3: Place, nginx: Place) -> None:
    for url in ("s3://no-such-bucket/clips", f"{s3.url}/clips", f"{nginx.url}/clips"):
        with pytest.raises(CacheError, match=f"there is no cache at {url}"):
            CacheReader(url, BRIEF)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("locked", "no access to .*403"),
        ("login", "no access to .*401"),
        ("broken", "has not answered for .* 503"),
    ],
)
def test_http_refusals(nginx: Place, path: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=expected):
        CacheReader(f"{nginx.url}/{path}/clips", BRIEF)
    Connection(Url(nginx.url), 0.5).size("none")  # nginx writes down a request before it answers the next one
    asked = sum(f"/{path}/" in line for line in requests(tmp_path / "nginx"))
    assert asked > 1 if path == "broken" else asked == 1  # only what may pass is asked for again


def test_a_server_without_ranges_is_refused_before_it_sends_everything(nginx: Place, cache: Path) -> None:
    nginx.publish(cache)
    reader = CacheReader(f"{nginx.url}/whole/clips")
    with pytest.raises(CacheError, match="parts of a file") as caught:
        reader.read(LATENTS, reader.keys(LATENTS)[1])
    assert "nginx" in caught.value.hint


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(CacheError, match="needs the package gcsfs") as caught:
        CacheReader("gs://bucket/clips")
    assert "cogcache[gs]" in caught.value.hint


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_bytes_that_changed_on_the_server_are_damage(s3: Place, cache: Path, tmp_path: Path) -> None:
    url = s3.publish(cache)
    reader = CacheReader(url)
    key = reader.keys(LATENTS)[0]
    (shard,) = (s3.folder / "clips" / "latents").glob("*.tar")
    offset = shard.read_bytes().index(b".safetensors") + 1500
    flip(shard, offset)
    with pytest.raises(DamagedCacheError, match=f"{url}/latents/{shard.name} is damaged"):
        reader.read(LATENTS, key)
    assert len(reader.damages()) == 1
    assert run(["verify", url]) == 5
    flip(shard, offset)
    reader.read(LATENTS, key)  # the wrong bytes were not kept
    assert run(["verify", url]) == 0
    assert run(["verify", url, "--repair"]) == 2
    (s3.folder / "clips" / "samples.jsonl").write_text("{}\n")
    s3.server.restart()
    with pytest.raises(DamagedCacheError, match=r"samples\.jsonl is missing or not the one"):
        CacheReader(url, RemoteOptions(folder=tmp_path / "empty"))


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.glob("??/*") if path.is_file()]


def test_torn_and_changed_copies_are_fetched_again(
    s3: Place, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, options = s3.publish(cache), RemoteOptions(folder=tmp_path / "lru")
    expected = everything(CacheReader(url, options))
    for number, path in enumerate(sorted(kept(tmp_path / "lru"))):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if number % 2 else bytes(len(data)))
    assert everything(CacheReader(url, options)) == expected
    asked = fetches(monkeypatch)
    assert everything(CacheReader(url, options)) == expected
    assert asked == []


def test_commands_take_urls(
    s3: Place, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = s3.publish(cache)
    assert run(["inspect", url, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["root"] == url
    assert len(report["samples"]) == 6
    assert run(["export", url, str(tmp_path / "two"), "--limit", "2"]) == 0
    assert run(["merge", str(tmp_path / "all"), url, str(tmp_path / "two")]) == 0
    assert CacheReader(tmp_path / "all").samples == CacheReader(cache).samples


@pytest.mark.parametrize(
    ("text", "expected"),
    [("ftp://x/y", "ftp:// is not known"), ("s3://", "names no folder"), ("s3://b/../c", "names no folder")],
)
def test_wrong_urls(text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--shards", text]) == 2
    assert expected in capsys.readouterr().err


def test_urls_stay_as_they_are() -> None:
    config = TrainConfig(shards="s3://bucket/a b/clips/")
    assert config.shards == Url("s3://bucket/a b/clips")
    assert config.model_dump(mode="json")["shards"] == "s3://bucket/a b/clips"
    assert TrainConfig(shards="file:///data/clips").shards == Path("/data/clips")
    assert TrainConfig(shards="C://x" if os.name == "nt" else "data/clips").shards == Path("data/clips")


def read_all(reader: CacheReader) -> int:
    return len(everything(reader))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes(s3: Place, cache: Path) -> None:
    reader = CacheReader(s3.publish(cache))
    count = read_all(reader)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read_all, [reader] * 2) == [count] * 2
