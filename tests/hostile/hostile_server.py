"""An HTTP server that lies: ``python hostile_server.py FOLDER`` prints its port and serves the files in ``FOLDER``.

The first part of a path, ``/c<seed>/...``, decides which lies are told, so a case needs nothing but its address;
``/honest/...`` tells none.
"""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hostile_mutations import mutate_bytes

__all__ = ["NOBODY", "serving"]

NOBODY = 1
"""A port that nobody listens on."""
_ENDLESS = 2048
_PAGE = b"<!doctype html><html><body><a href='/etc/passwd'>Log in</a></body></html>"
_PIECE = bytes(1 << 20)
_BOMB = gzip.compress(bytes(1 << 28))
_FILES: dict[str, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_HEAD(self) -> None:
        """See :meth:`_answer`."""
        self._answer()

    def do_GET(self) -> None:
        """See :meth:`_answer`."""
        self._answer()

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _answer(self) -> None:
        with suppress(OSError):
            _, case, *rest = self.path.split("/")
            name = "/".join(rest)
            lies = random.Random(f"{case}")
            trick, often = lies.choice(_TRICKS), lies.choice((1.0, 0.5, 0.2))
            chosen = random.Random(f"{self.path} {self.command} {self.headers.get('Range')}")
            if case == "honest" or chosen.random() > often:
                trick = Handler._honest
            data = _FILES.get(name)
            if data is None:
                return self._send(404, b"not here")
            trick(self, data, chosen)
        return None

    def _send(self, status: int, body: bytes, size: object = None, **headers: object) -> None:
        """An answer whose ``Content-Length`` is ``size``; that of the body for None, not said for ''."""
        self.send_response_only(status)
        size = len(body) if size is None else size
        if size != "":
            self.send_header("Content-Length", str(size))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _range(self, data: bytes) -> tuple[int, int] | None:
        """What was asked for: first byte and the one behind the last."""
        said = self.headers.get("Range", "")
        if not said.startswith("bytes="):
            return None
        start, _, end = said.removeprefix("bytes=").partition("-")
        return int(start), min(int(end) + 1, len(data))

    def _part(self, data: bytes) -> bytes:
        found = self._range(data)
        return data if found is None else data[slice(*found)]

    def _status(self) -> int:
        return 206 if "Range" in self.headers else 200

    def _honest(self, data: bytes, _: random.Random) -> None:
        found = self._range(data)
        more = {} if found is None else {"Content_Range": f"bytes {found[0]}-{found[1] - 1}/{len(data)}"}
        self._send(self._status(), self._part(data), **more)

    def _changed(self, data: bytes, chosen: random.Random) -> None:
        self._send(self._status(), mutate_bytes(self._part(data), chosen))

    def _other_size(self, data: bytes, chosen: random.Random) -> None:
        part = self._part(data)
        sizes = (0, len(part) - 1, len(part) + 1, 1 << 40, 1 << 63, 10**400, -1, "x", "1, 2", "")
        self._send(self._status(), part, chosen.choice(sizes))

    def _short(self, data: bytes, chosen: random.Random) -> None:
        part = self._part(data)
        self._send(self._status(), part[: chosen.randrange(len(part) + 1)])

    def _long(self, data: bytes, chosen: random.Random) -> None:
        self._send(self._status(), self._part(data) + bytes(chosen.choice((1, 100, 1 << 24))))

    def _endless(self, _: bytes, chosen: random.Random) -> None:
        self._send(chosen.choice((200, 206)), b"", chosen.choice(("", 1 << 40)))
        if self.command == "GET":
            for _piece in range(_ENDLESS):
                self.wfile.write(_PIECE)

    def _whole(self, data: bytes, _: random.Random) -> None:
        self._send(200, data)

    def _page(self, _: bytes, chosen: random.Random) -> None:
        self._send(chosen.choice((200, 203, 206)), _PAGE, Content_Type="text/html")

    def _odd_status(self, data: bytes, chosen: random.Random) -> None:
        odd = (
            100,
            204,
            205,
            300,
            304,
            400,
            401,
            403,
            404,
            405,
            408,
            410,
            416,
            418,
            429,
            451,
            500,
            503,
            599,
            999,
        )
        self._send(chosen.choice(odd), self._part(data))

    def _elsewhere(self, _: bytes, chosen: random.Random) -> None:
        port = self.server.server_address[1]
        places = (
            *(self.path, "/honest/manifest.json", "/honest/cache.json", "/gone", "", "//", "?x", "\u00e9"),
            *("file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:0", "http://", "http://[", "x" * 70_000),
            *(
                f"http://127.0.0.1:{NOBODY}/x",
                f"http://127.0.0.1:{port}/honest/samples.jsonl",
                "http://a:b@/x",
            ),
            *(f"http://127.0.0.1:{port}99/", "data:text/plain,x", "unix:///dev/log", "../../etc/passwd"),
        )
        place = chosen.choice(places).encode("latin-1").decode("latin-1")
        self._send(chosen.choice((301, 302, 303, 307, 308)), b"", Location=place)

    def _bomb(self, data: bytes, chosen: random.Random) -> None:
        body = chosen.choice((_BOMB, gzip.compress(self._part(data)), b"\x1f\x8b\x08x", data))
        coding = chosen.choice(("gzip", "gzip", "deflate", "br", "x", "gzip, gzip"))
        self._send(self._status(), body, Content_Encoding=coding)

    def _odd_range(self, data: bytes, chosen: random.Random) -> None:
        said = (
            "",
            "bytes",
            "bytes x-y/z",
            "bytes 0-0/0",
            "bytes 5-3/1",
            f"bytes 0-{1 << 70}/*",
            "items 1-2/3",
        )
        other = data[chosen.randrange(len(data)) :] if chosen.random() < 0.5 else self._part(data)
        self._send(206, other, Content_Range=chosen.choice(said))

    def _no_http(self, _: bytes, chosen: random.Random) -> None:
        self.wfile.write(
            chosen.choice(
                (
                    *(b"", b"\r\n", b"\0" * 5000, b"HTTP/1.1", b"HTTP/9.9 200 OK\r\n\r\n", b"SSH-2.0-x\r\n"),
                    *(b"HTTP/1.1 -5 x\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 5000 + b"\r\n"),
                    *(
                        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
                        b"HTTP/1.1 200 OK\r\n\x00: 1\r\n\r\n",
                    ),
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\nx",
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n0\r\n\r\n",
                    b"HTTP/1.1 206 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
                )
            )
        )


_TRICKS = (
    *(Handler._changed, Handler._other_size, Handler._short, Handler._long, Handler._endless, Handler._whole),
    *(Handler._page, Handler._odd_status, Handler._elsewhere, Handler._bomb, Handler._odd_range),
    *(Handler._no_http, Handler._honest),
)


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """A process that serves ``folder``; gives its port."""
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def main(folder: Path) -> None:
    """Body of the process."""
    for path in folder.rglob("*"):
        if path.is_file():
            _FILES[path.relative_to(folder).as_posix()] = path.read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
