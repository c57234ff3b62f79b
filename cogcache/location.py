"""Where a cache is: a folder of this machine, or a URL such as ``s3://bucket/clips``.

:class:`Url` has the few methods of :class:`~pathlib.Path` that names are made with, so that one line of code
says ``root / "manifest.json"`` for both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias
from urllib.parse import unquote

from pydantic import BeforeValidator, PlainSerializer

from cogcache.errors import ConfigError

__all__ = ["PROTOCOLS", "Location", "LocationField", "Url", "folder_name", "local_folder", "parse_location"]

PROTOCOLS = ("s3", "gs", "hf", "https", "http", "memory")
"""What a URL may begin with; ``memory`` lives in this process alone and is there for tests."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


@dataclass(frozen=True)
class Url:
    """A folder or file of a server. ``text`` has no ``/`` at its end."""

    text: str

    @property
    def protocol(self) -> str:
        """``s3`` for ``s3://bucket/clips``."""
        return self.text.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.text.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """:attr:`name` without its suffix."""
        return Path(self.name).stem

    @property
    def parent(self) -> Url:
        """What lies above."""
        return Url(self.text.rpartition("/")[0])

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    def __str__(self) -> str:
        return self.text


Location: TypeAlias = Path | Url


def parse_location(value: object) -> Location:
    """A folder or a URL from what the user wrote; ``file://`` is a folder.

    Raises:
        ConfigError: if it is the URL of a protocol that is not known, or of nothing in particular.
    """
    if isinstance(value, (Path, Url)):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{value!r:.80} is neither a folder nor a URL.")
    match = _URL.fullmatch(value)
    if match is None:
        return Path(value)
    protocol, rest = match[1].lower(), match[2].strip("/")
    if protocol == "file":
        return Path(unquote(match[2]))
    if protocol not in PROTOCOLS:
        raise ConfigError(
            f"{value}: the protocol {protocol}:// is not known.",
            "Give a folder, or a URL with " + ", ".join(f"{name}://" for name in PROTOCOLS[:-2]) + ".",
        )
    parts = rest.split("/")
    if protocol.startswith("http") and "?" in rest:
        raise ConfigError(f"{value} has a query.", "Give the plain address of the folder.")
    if not rest or "" in parts or any(part in (".", "..") for part in parts):
        raise ConfigError(f"{value} names no folder.", "Give a bucket or server, and the path in it.")
    return Url(f"{protocol}://{rest}")


def local_folder(value: str) -> Path:
    """A folder of this machine from what the user wrote.

    Raises:
        ConfigError: if it is a URL.
    """
    location = parse_location(value)
    if isinstance(location, Url):
        raise ConfigError(
            f"{value} is not on this machine, and this needs a folder.", "Copy the cache here first."
        )
    return location


def folder_name(location: Location) -> str:
    """What is made of a cache is called like its folder."""
    return location.resolve().name if isinstance(location, Path) else location.name


def _validated(value: object) -> object:
    try:
        return parse_location(value)
    except ConfigError as error:  # pydantic names the setting
        raise ValueError(str(error)) from None


LocationField = Annotated[
    Path | Url, BeforeValidator(_validated), PlainSerializer(lambda value: str(value), return_type=str)
]
"""A :data:`Location` among the settings: text in YAML and on the command line."""
