"""One fsspec file system: what is asked of a server, each question repeated until it is answered."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from cogcache.cache.regular import LARGEST_FILE
from cogcache.cache.remote import http, hub
from cogcache.cache.remote.google import open_google
from cogcache.cache.remote.patience import Patience
from cogcache.errors import CacheError
from cogcache.location import Url

__all__ = ["Connection"]

T = TypeVar("T")

_PACKAGES = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}
"""Module and extra that each protocol needs."""

_HTTP = ("http", "https")
_SESSIONS = {"http": "client_kwargs", "https": "client_kwargs", "gs": "session_kwargs"}
"""What the file systems call the settings of their aiohttp session."""

_CONNECT_S, _READ_S = 10, 60

_SETTINGS = ("AWS_", "FSSPEC_", "GOOGLE_", "HF_", "STORAGE_EMULATOR_HOST")
"""Beginnings of the environment variables that the file systems look at."""

_opening = threading.Lock()


class Connection:
    """The files under ``url``, by names relative to it. Thread-safe; belongs to one process.

    Every method raises :class:`FileNotFoundError` where the server says that there is no such file, and
    :class:`~cogcache.errors.CacheError` where it refuses or does not answer for ``patience`` seconds.

    Args:
        known: Whether the server has answered before: if it never has, it is asked for half a minute only.
    """

    def __init__(self, url: Url, patience: float, known: bool = False) -> None:
        self._url = url
        self._patience = Patience(url, patience, known)
        self._fs = _file_system(url)
        self._root = str(self._fs._strip_protocol(url.text))

    @property
    def known(self) -> bool:
        """Whether the server has answered."""
        return self._patience.known

    def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return self._patience.call(lambda: function(*args, **kwargs))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes:
        """A whole file of at most :data:`~cogcache.cache.regular.LARGEST_FILE` bytes."""
        if self._url.protocol in _HTTP:
            return self._call(http.fetch_whole, self._fs, self._url / name, LARGEST_FILE)
        if self._url.protocol == "hf":
            return self._call(hub.fetch_whole, self._fs, self._path(name))
        return bytes(self._call(self._fs.cat_file, self._path(name)))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            info = self._call(self._fs.info, self._path(name))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info.get("size") is not None and info.get("type") == "file" else None

    def fetch(self, name: str, start: int, size: int) -> bytes:
        """``size`` bytes from ``start``; fewer only at the end of the file. Never reads more into memory."""
        if size == 0:
            return b""
        if self._url.protocol in _HTTP:  # cat_file() would take whatever comes, however much it is
            return self._call(http.fetch_part, self._fs, self._url / name, start, size)
        if self._url.protocol == "hf":
            return self._call(hub.fetch_part, self._fs, self._path(name), start, size)
        return bytes(self._call(self._fs.cat_file, self._path(name), start=start, end=start + size))[:size]

    def upload(self, source: Path | bytes, name: str) -> None:
        """Put a file, or bytes, under ``name``, and see that all of it has arrived.

        Raises:
            CacheError: also if there is no such bucket, or if what is there afterwards has another size.
            FileNotFoundError: if ``source`` is not there.
        """
        try:
            with hub.quiet_uploads() if self._url.protocol == "hf" else nullcontext():
                if isinstance(source, bytes):
                    self._call(self._fs.pipe_file, self._path(name), source)
                else:
                    self._call(self._fs.put_file, str(source), self._path(name))
        except FileNotFoundError as error:
            if isinstance(source, Path) and not source.exists():
                raise
            raise CacheError(
                f"there is nothing to write to at {self._url}: no such bucket or repository.",
                "Make it, and run again: what has been made here is kept.",
            ) from error
        sent, found = len(source) if isinstance(source, bytes) else source.stat().st_size, self.size(name)
        if found != sent:
            raise CacheError(f"{self._url / name} has {found} bytes after {sent} were sent.", "Run it again.")

    def remove(self, name: str) -> None:
        """Remove a file, where it is there."""
        if self.size(name) is not None:
            with suppress(FileNotFoundError):  # removed, but the answer was lost, and it was asked again
                self._call(self._fs.rm_file, self._path(name))

    def names(self, folder: str) -> dict[str, int]:
        """Names and sizes of the files right in ``folder`` (``""`` for all of it); none where it is not there."""
        try:
            found = self._call(self._fs.ls, self._path(folder).rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        return {str(e["name"]).rpartition("/")[2]: int(e["size"]) for e in found if e["type"] == "file"}

    def tree(self, folder: str) -> list[str]:
        """Names of all files below ``folder``, as the other methods take them, in order."""
        path = self._path(folder).rstrip("/")
        inside = len(self._fs._strip_protocol(path)) + 1
        return sorted(f"{folder}/{name[inside:]}" for name in self._call(self._fs.find, path))


def _file_system(url: Url) -> Any:
    module, extra = _PACKAGES.get(url.protocol, ("", ""))
    try:
        if module:
            importlib.import_module(module)
    except ImportError:
        raise CacheError(
            f"{url} needs the package {module}.", f"Install it: pip install 'cogcache[{extra}]'"
        ) from None
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(_SETTINGS)))
    with _opening:
        return _open_file_system(url.protocol, os.getpid(), settings)


@cache
def _open_file_system(protocol: str, process: int, settings: tuple[tuple[str, str], ...]) -> Any:
    """One for all connections of a process: they share sockets, and none is ever closed.

    s3fs closes a file system when it is collected, in whatever thread that happens; one that uses another at that
    moment may wait for ever.
    """
    import fsspec

    _ = process, settings
    options = {"use_listings_cache": False, "skip_instance_cache": True, **_options(protocol)}
    if protocol == "gs":
        return open_google(**options)
    fs = fsspec.filesystem(protocol, **options)
    if protocol == "s3":
        fs.retries = 1  # Patience asks again, and tells
    return fs


def _options(protocol: str) -> dict[str, Any]:
    """Limits on the time of one request, and no repeating inside the libraries where that can be turned off."""
    if protocol == "s3":
        config = {
            "connect_timeout": _CONNECT_S,
            "read_timeout": _READ_S,
            "retries": {"total_max_attempts": 1},
            # Some servers answer a range with the checksum of the whole file. Each byte is checked here anyway.
            "response_checksum_validation": "when_required",
        }
        return {"config_kwargs": config}
    if protocol in _SESSIONS:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)
        return {_SESSIONS[protocol]: {"timeout": timeout, "trust_env": True}}
    return {}
