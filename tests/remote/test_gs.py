"""What only Google's storage says; that caches are read and written is in the tests of all servers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from addresses import google
from servers import Bucket, refusing

from cogcache.cache.reader import CacheReader
from cogcache.cache.remote import patience
from cogcache.cache.remote.connection import Connection
from cogcache.cache.remote.storage import RemoteOptions
from cogcache.errors import CacheError
from cogcache.location import Url

BRIEF = RemoteOptions(patience=0.5)
URL = "gs://bucket/clips"
ANONYMOUS = "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."


def body(status: int, message: str) -> str:
    """An error as the JSON interface of Google's storage words it."""
    reason = {"message": message, "domain": "global", "reason": "required"}
    return json.dumps({"error": {"code": status, "message": message, "errors": [reason]}})


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (401, body(401, ANONYMOUS), rf"no access to {URL}: {ANONYMOUS[:-1]}.*GOOGLE_APPLICATION_CREDENTIALS"),
        (401, ANONYMOUS, rf"no access to {URL}: {ANONYMOUS[:-1]}"),  # so it answers to a download
        (401, body(401, "Invalid Credentials"), rf"no access to {URL}: Invalid Credentials"),
        (
            403,
            body(403, "a@b does not have storage.objects.get access."),
            rf"no access to {URL}: .*a@b does not",
        ),
        (400, body(400, "Invalid bucket name: 'bucket'"), rf"no use of {URL}: .*Invalid bucket name"),
        (400, body(400, "an invalid argument"), rf"no use of {URL}: .*an invalid argument"),
        (429, body(429, "The rate is exceeded."), rf"{URL} has not answered for .*: The rate is exceeded"),
        (503, body(503, "Backend Error"), rf"{URL} has not answered for .*: Backend Error"),
    ],
)
def test_refusals(status: int, text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing(status, text) as (address, asked):
        google(monkeypatch, address)
        with pytest.raises(CacheError, match=expected):
            CacheReader(URL, BRIEF)
        assert (
            len(asked) > 1 if status in (429, 503) else len(asked) == 1
        )  # only what may pass is asked for again


def test_refusals_of_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing(403, body(403, "no storage.objects.create access.")) as (address, asked):
        google(monkeypatch, address)
        with pytest.raises(CacheError, match=f"no access to {URL}: .*objects.create"):
            Connection(Url(URL), 0.5).upload(b"data", "cache.json")
        assert len(asked) == 1


def test_credentials_that_are_not_where_the_user_says(gs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs would go on without any."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/key.json")
    with pytest.raises(CacheError, match=r"names /no/such/key\.json, which is no file"):
        CacheReader(f"{gs.url}/clips")


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    google(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(CacheError, match=r"has not answered for \d s: .*STORAGE_EMULATOR_HOST"):
        CacheReader(URL, BRIEF)


def test_nothing_there(gs: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    for url in ("gs://no-such-bucket/clips", f"{gs.url}/clips"):
        with pytest.raises(CacheError, match=f"there is no cache at {url}"):
            CacheReader(url, BRIEF)
    assert "bucket type" not in caplog.text  # which gcsfs asks for by gRPC, before every request


@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")  # gcsfs does so
def test_a_large_file_whose_upload_is_broken_off_is_sent_again(
    gs: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 5 MiB on gcsfs opens an upload, and sends its parts."""
    import gcsfs.core

    (tmp_path / "large").write_bytes(random.Random(0).randbytes(6 << 20))
    send, said, parts = gcsfs.core.upload_chunk, [], 0

    async def killing(*arguments: Any) -> Any:
        nonlocal parts
        parts += 1
        if parts == 1:
            gs.server.kill()
        return await send(*arguments)

    def heard(text: str) -> None:
        said.append(text)
        gs.server.start()

    monkeypatch.setattr(gcsfs.core, "upload_chunk", killing)
    monkeypatch.setattr(patience, "say", heard)
    Connection(Url(gs.url), 60, known=True).upload(tmp_path / "large", "clips/large")
    assert (gs.folder / "clips" / "large").read_bytes() == (tmp_path / "large").read_bytes()
    assert parts == 2
    assert "does not answer" in said[0]
