"""What only the Hugging Face hub says; that caches are read and written is in the tests of all servers."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from conftest import hugging_face
from hub import READER
from huggingface_hub import constants
from servers import Place, refusing

from cogcache.cache.reader import CacheReader
from cogcache.cache.remote.connection import Connection
from cogcache.cache.remote.storage import RemoteOptions
from cogcache.errors import CacheError
from cogcache.location import Url

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
BRIEF = RemoteOptions(patience=0.5)


def repository(hf: Place, name: str) -> Path:
    """Another data set of the hub, with nothing in it."""
    folder = hf.folder.parents[1] / name / "main"
    folder.mkdir(parents=True)
    return folder


def test_parts_of_files(hf: Place) -> None:
    """Large ones lie behind a redirect."""
    for name in ("large.tar", "small.json"):
        (hf.folder / name).write_bytes(bytes(range(100)))
        connection = Connection(Url(hf.url), 5)
        assert connection.read(name) == bytes(range(100))
        assert connection.fetch(name, 0, 7) == bytes(range(7))
        assert connection.fetch(name, 90, 20) == bytes(range(90, 100))
        assert connection.fetch(name, 100, 20) == b""


def test_a_part_is_one_request(hf: Place, tmp_path: Path) -> None:
    (hf.folder / "small.json").write_bytes(bytes(100))
    connection = Connection(Url(hf.url), 5)
    for start in range(5):
        connection.fetch("small.json", start, 10)
    asked = [line for line in (tmp_path / "hub.log").read_text().splitlines() if "/datasets/user" in line]
    assert sum("/resolve/" in line for line in asked) == 5
    assert len(asked) == 6  # and whether there is such a repository


def test_a_listing_of_many_pages(hf: Place) -> None:
    names = [f"{number:02}.json" for number in range(10)]
    (hf.folder / "clips" / "below").mkdir(parents=True)
    for name in (*names, "below/deep.json"):
        (hf.folder / "clips" / name).write_bytes(b"1234")
    connection = Connection(Url(f"{hf.url}/clips"), 5)
    assert connection.names("") == dict.fromkeys(names, 4)
    assert connection.names("none") == {}
    assert connection.tree("below") == ["below/deep.json"]


def test_revisions(hf: Place, cache: Path) -> None:
    shutil.copytree(cache, hf.folder.parent / "v1" / "clips")
    assert CacheReader(f"{hf.url}@v1/clips").samples == CacheReader(cache).samples
    for url in (f"{hf.url}/clips", f"{hf.url}@v2/clips"):
        with pytest.raises(CacheError, match=f"there is no cache at {url}"):
            CacheReader(url, BRIEF)


def test_a_private_repository(hf: Place, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(cache, repository(hf, "private") / "clips")
    url = "hf://datasets/user/private/clips"
    monkeypatch.setenv("HF_TOKEN", READER)
    assert CacheReader(url).samples == CacheReader(cache).samples
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CacheError, match=f"no access to {url}: .*HF_TOKEN"):
        CacheReader(url, BRIEF)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(CacheError, match=f"no access to {url}: .*repository not found.*HF_TOKEN"):
        CacheReader(url, BRIEF)


@pytest.mark.parametrize(("token", "status"), [(READER, "403"), (None, "401")])
def test_a_token_that_may_not_write(
    token: str | None, status: str, hf: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(CacheError, match=rf"no access to {hf.url}/clips: (?s:.)*{status}(?s:.)*HF_TOKEN"):
        Connection(Url(f"{hf.url}/clips"), 0.5).upload(b"data", "cache.json")


@pytest.mark.parametrize(
    ("status", "expected"), [(503, "has not answered for"), (429, "has not answered for")]
)
def test_a_hub_that_is_overloaded(status: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing(status, "{}") as (address, asked):
        hugging_face(monkeypatch, address)
        with pytest.raises(CacheError, match=f"{expected} .*{status}"):
            CacheReader("hf://datasets/user/repo/clips", BRIEF)
        assert len(asked) > 1


def test_nobody_there_and_offline(hf: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(CacheError, match=r"has not answered for \d s: .*HF_ENDPOINT"):
        CacheReader(f"{hf.url}/clips", BRIEF)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CacheError, match=r"no use of .*offline mode is enabled"):
        CacheReader(f"{hf.url}/clips", BRIEF)


def test_a_file_that_is_gone_already_is_removed(hf: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an answer that was lost on its way."""
    connection = Connection(Url(hf.url), 5)
    connection.upload(b"data", "a.json")
    connection.remove("a.json")
    assert connection.size("a.json") is None
    monkeypatch.setattr(connection, "size", lambda _: 4)
    connection.remove("a.json")


def test_no_bar_is_drawn_for_each_file(hf: Place, capsys: pytest.CaptureFixture[str]) -> None:
    Connection(Url(hf.url), 5).upload(b"data", "a.tar")
    assert capsys.readouterr().err == ""
    assert (hf.folder / "a.tar").read_bytes() == b"data"
    assert not huggingface_hub.utils.are_progress_bars_disabled()
