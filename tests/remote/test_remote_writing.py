"""Writing a cache to a server through a staging folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import Place

sys.path.append(str(Path(__file__).parents[1] / "cache"))
from cache_kit import (
    BAD,
    CLIPS,
    LATENT_KEYS,
    TEXT_KEYS,
    Crash,
    FakeOs,
    encode,
    fill,
    identity,
    install,
    latent_key,
    sample,
    snapshot,
)

from cogcache.cache.format import LATENTS, TEXT, FailureRecord, Manifest
from cogcache.cache.reader import CacheReader
from cogcache.cache.remote import patience
from cogcache.cache.remote.connection import Connection
from cogcache.cache.remote.mirror import Mirror
from cogcache.cache.remote.storage import RemoteOptions
from cogcache.cache.writer import CacheWriter
from cogcache.errors import CacheError, ConfigError, MismatchError
from cogcache.location import Url

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own

OPTIONS = RemoteOptions(limit=0, patience=5)


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    install(FakeOs(), monkeypatch)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a cache made in a folder."""
    root = tmp_path_factory.mktemp("local") / "cache"
    encode(root)
    return {name: data for name, data in snapshot(root).items() if name != ".lock"}


def encode_to(url: str, staging: Path, clips: int = CLIPS, done: Callable[[str], object] = str) -> Manifest:
    """A whole run of the first ``clips`` clips."""
    mirror = Mirror(Url(url), staging, patience=5)
    mirror.pull()
    writer = CacheWriter.open(staging, identity(), copy=mirror)
    keys = LATENT_KEYS[:clips]
    writer.plan(LATENTS, keys, 3)
    writer.plan(TEXT, TEXT_KEYS, 100)
    fill(writer, LATENTS, keys, done)
    fill(writer, TEXT, TEXT_KEYS, done)
    failed = FailureRecord(id="bad", source="bad.mp4", window="start", reason="cannot be decoded")
    samples = [sample(clip) for clip in range(clips) if clip != BAD]
    return writer.commit(samples, [failed], TEXT_KEYS[0])


class Steps:
    """Counts every change on the server; the one with number ``stop_at``, from 0, and all later ones do not happen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.log: list[str] = []
        for name in ("upload", "remove"):
            monkeypatch.setattr(Connection, name, self._counted(getattr(Connection, name), stop_at))

    def _counted(self, change: Callable[..., None], stop_at: int | None) -> Callable[..., None]:
        def counted(connection: Connection, *arguments: Any) -> None:
            if stop_at is not None and len(self.log) >= stop_at:
                raise Crash
            self.log.append(str(arguments[-1]))
            change(connection, *arguments)

        return counted


@pytest.fixture(params=["s3", "gs", "hf"])
def place(request: pytest.FixtureRequest) -> Place:
    """Each of the servers that can be written to."""
    found: Place = request.getfixturevalue(request.param)
    return found


def test_what_is_sent_equals_what_is_made_in_a_folder(
    place: Place, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, steps = f"{place.url}/made", Steps(monkeypatch)
    encode_to(url, tmp_path / "staging")
    assert snapshot(place.folder / "made") == expected
    assert steps.log.index("cache.json") == 0
    assert steps.log.index("latents/latents-00000.tar") < steps.log.index("latents/latents-00000.index.jsonl")
    manifest = steps.log.index("manifest.json")
    assert all(steps.log.index(name) < manifest for name in expected if name.startswith(("latents", "text")))
    assert steps.log.index("samples.jsonl.next") < manifest < steps.log.index("samples.jsonl")
    assert not list((tmp_path / "staging").rglob("*.tar"))
    steps.log.clear()
    encode_to(url, tmp_path / "staging", done=pytest.fail)
    assert steps.log == []  # nothing to do, nothing sent


def state(url: str) -> str:
    """Checksum of the cache that a reader finds; empty for none."""
    try:
        reader = CacheReader(url, OPTIONS)
    except CacheError as error:
        assert "there is no cache" in error.message or "has not finished" in error.message  # noqa: PT017
        return ""
    assert reader.damages() == []
    return reader.manifest.checksum


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("before", [0, 3], ids=["new", "added to"])
def test_stopped_before_every_step_it_is_the_old_cache_or_the_new_one(
    before: int, every: int, s3: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        steps = Steps(patch)
        old = encode_to(f"{s3.url}/whole", tmp_path / "whole", before).checksum if before else ""
        steps.log.clear()
        new = encode_to(f"{s3.url}/whole", tmp_path / "whole").checksum
    whole, seen = snapshot(s3.folder / "whole"), []
    for stop_at in sorted({*range(0, len(steps.log), every), len(steps.log) - 1}):
        url, staging = f"{s3.url}/run-{stop_at}", tmp_path / f"staging-{stop_at}"
        if before:
            encode_to(url, staging, before)
        with monkeypatch.context() as patch:
            Steps(patch, stop_at)
            with pytest.raises(Crash):
                encode_to(url, staging)
        seen.append(state(url))
        if stop_at % 2:
            shutil.rmtree(staging)  # all that was made here is lost, too
        encode_to(url, staging)
        assert state(url) == new, stop_at
        assert snapshot(s3.folder / f"run-{stop_at}") == whole, stop_at
    assert seen == sorted(seen, key=[old, new].index)
    assert {old, new} == set(seen)


def test_without_its_staging_a_run_makes_nothing_again(
    s3: Place, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3.url}/lost"
    encode_to(url, tmp_path / "first", clips=3)
    made: list[str] = []
    steps = Steps(monkeypatch)
    encode_to(url, tmp_path / "second", done=made.append)
    assert made == [latent_key(3), latent_key(4)]
    assert [name for name in steps.log if name.endswith(".tar")] == ["latents/latents-00001.tar"]
    assert snapshot(s3.folder / "lost") == expected
    (s3.folder / "lost" / "latents" / "latents-00000.tar").unlink()  # lost on the server
    (s3.folder / "lost" / "latents" / "latents-00000.index.jsonl").unlink()
    s3.server.restart()
    encode_to(url, tmp_path / "second", done=made.append)
    assert set(made[2:]) == {latent_key(0), latent_key(2)}
    assert CacheReader(url, OPTIONS).damages() == []


def test_a_server_that_is_killed_between_uploads_is_waited_for(
    place: Place, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    upload = Connection.upload

    def killing(self: Connection, source: Path | bytes, name: str) -> None:
        if name == "latents/latents-00001.tar":
            place.server.kill()
        upload(self, source, name)

    def heard(text: str) -> None:
        said.append(text)
        place.server.start()

    monkeypatch.setattr(Connection, "upload", killing)
    monkeypatch.setattr(patience, "say", heard)
    encode_to(f"{place.url}/killed", tmp_path / "staging")
    assert snapshot(place.folder / "killed") == expected
    assert len(said) == 2


def test_no_such_bucket(place: Place, tmp_path: Path) -> None:
    url = f"{place.url}-not/clips"
    with pytest.raises(CacheError, match=f"nothing to write to at {url}: no such bucket"):
        encode_to(url, tmp_path / "staging")


def test_two_stagings_never_overwrite_each_other(s3: Place, tmp_path: Path) -> None:
    url, other = f"{s3.url}/two", identity(**{TEXT: {"length": 9}})
    mirror = Mirror(Url(url), tmp_path / "one")
    writer = CacheWriter.open(tmp_path / "one", identity(), copy=mirror)
    writer.plan(LATENTS, LATENT_KEYS[3:], 3)
    encode_to(url, tmp_path / "two", clips=3)
    before = snapshot(s3.folder / "two")
    with pytest.raises(CacheError, match="two runs have written there"):
        fill(writer, LATENTS, LATENT_KEYS[3:])
    with pytest.raises(CacheError, match="two runs have written there"):
        Mirror(Url(url), tmp_path / "one").pull()
    CacheWriter.open(tmp_path / "three", other)
    with pytest.raises(MismatchError, match="length"):
        Mirror(Url(url), tmp_path / "three").pull()
    assert snapshot(s3.folder / "two") == before


def test_a_series_is_dropped_with_all_its_folders_and_no_other(
    s3: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3.url}/dropped"
    connection = Connection(Url(url), patience=5)
    kept = ["cache.json", "images-of-another-kind/a.tar", "latents/a/c/0"]
    dropped = ["images/49x64/c/0/0", "images/49x64/zarr.json", "images/a.tar", "images/b.index.jsonl"]
    for name in (*kept, *dropped, "manifest.json"):
        connection.upload(b"x", name)
    steps = Steps(monkeypatch)
    Mirror(Url(url), tmp_path / "staging", patience=5).drop("images")
    assert sorted(snapshot(s3.folder / "dropped")) == kept
    assert steps.log[:2] == ["manifest.json", "images/b.index.jsonl"]
    Mirror(Url(url), tmp_path / "staging", patience=5).drop("images")  # nothing is there
    assert sorted(snapshot(s3.folder / "dropped")) == kept


def test_a_web_server_is_only_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can only be read") as caught:
        Mirror(Url("https://server/clips"), tmp_path)
    assert "s3://" in caught.value.hint
