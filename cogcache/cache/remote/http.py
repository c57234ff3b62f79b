"""Bytes of a file of an HTTP server, never more than were asked for, whatever the server sends."""

from __future__ import annotations

from typing import Any

from cogcache.errors import CacheError
from cogcache.location import Url

__all__ = ["fetch_part", "fetch_whole"]

_PIECE = 1 << 20
_PARTIAL, _PAST_END = 206, 416


def fetch_whole(fs: Any, url: Url, most: int) -> bytes:
    """A whole file.

    Args:
        fs: fsspec's ``HTTPFileSystem``.
        most: Bytes that it may have.

    Raises:
        CacheError: if it has more.
    """
    data = _run(fs, url, {}, most + 1)
    if len(data) > most:
        raise CacheError(
            f"{url} has more than {most} bytes, which no such file of a cache has.", "Check the address."
        )
    return data


def fetch_part(fs: Any, url: Url, start: int, size: int) -> bytes:
    """``size`` bytes from ``start``, 1 or more; fewer only at the end of the file.

    Raises:
        CacheError: if the server sends the whole file instead.
    """
    headers = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
    return _run(fs, url, headers, size, start)


def _run(fs: Any, url: Url, headers: dict[str, str], most: int, start: int = 0) -> bytes:
    from fsspec.asyn import sync

    return bytes(sync(fs.loop, _read, fs, url, headers, most, start))


async def _read(fs: Any, url: Url, headers: dict[str, str], most: int, start: int) -> bytearray:
    session = await fs.set_session()
    data = bytearray()
    async with session.get(fs.encode_url(url.text), headers=headers) as answer:
        if answer.status == _PAST_END and headers:
            return data
        fs._raise_not_found_for_status(answer, url.text)
        if start and answer.status != _PARTIAL:
            raise CacheError(
                f"{url.parent} does not answer requests for parts of a file.",
                "Use a server that knows HTTP ranges, as nginx and Apache do, or copy the cache to a folder.",
            )
        while len(data) < most and (piece := await answer.content.read(min(_PIECE, most - len(data)))):
            data += piece
        if len(data) >= most:
            answer.close()  # the rest is not waited for
    return data
