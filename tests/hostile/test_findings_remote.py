"""Small tests for defects that hostile servers, and changed files of the local cache, have shown."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cogcache.cache.remote import connection
from cogcache.cache.remote.connection import Connection
from cogcache.cache.remote.lru import Lru
from cogcache.errors import CacheError
from cogcache.location import Url

ENDLESS = 64 << 20
LARGEST = 1 << 20


class Endless(BaseHTTPRequestHandler):
    """Answers every request with more than was asked for; ``sent`` says with how much."""

    sent = 0

    def do_GET(self) -> None:
        self.send_response_only(206 if "Range" in self.headers else 200)
        self.end_headers()
        try:
            while Endless.sent < ENDLESS:
                self.wfile.write(b"x" * (1 << 16))
                Endless.sent += 1 << 16
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    monkeypatch.setattr(connection, "LARGEST_FILE", LARGEST)
    Endless.sent = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Connection(Url(f"http://127.0.0.1:{server.server_address[1]}/x"), 0.0)
        server.shutdown()
        thread.join()


def test_a_file_without_end_is_given_up(endless: Connection) -> None:
    with pytest.raises(CacheError, match="has more than 1048576 bytes"):
        endless.read("manifest.json")
    assert Endless.sent < ENDLESS


def test_a_part_without_end_is_cut(endless: Connection) -> None:
    assert endless.fetch("x.tar", 5, 100) == b"x" * 100
    assert Endless.sent < ENDLESS


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Lru, Path]:
    lru = Lru(tmp_path / "lru", 10_000)
    lru.put("key", b"abc")
    (path,) = (tmp_path / "lru").glob("??/*")
    return lru, path


def test_a_kept_file_that_became_huge_is_not_read(kept: tuple[Lru, Path]) -> None:
    lru, path = kept
    assert lru.get("key", 3) == b"abc"
    os.truncate(path, 1 << 36)
    assert lru.get("key") is None
    os.truncate(path, 4)
    assert lru.get("key", 3) is None


@pytest.mark.timeout(30)
def test_a_pipe_among_the_kept_files_is_not_waited_for(kept: tuple[Lru, Path]) -> None:
    lru, path = kept
    path.unlink()
    os.mkfifo(path)
    assert lru.get("key") is None


@pytest.mark.parametrize("total", ["-1000000000", "x", "9" * 5000, ""])
def test_the_number_of_bytes_kept_is_counted_anew_where_it_cannot_be(
    total: str, kept: tuple[Lru, Path]
) -> None:
    lru, path = kept
    (path.parents[1] / "total").write_text(total)
    for number in range(20):
        lru.put(str(number), bytes(1000))
    assert sum(file.stat().st_size for file in path.parents[1].glob("??/*")) <= 10_000
