"""Names of series and shards: the only names from files that become paths.

A shard is called ``<series>-<group>-<number>``: ``latents-49x480x720-00007``. The group is the shape that all its
entries share, as numbers joined by ``x``; a shard without one (``latents-00007``) may hold any.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cogcache.errors import CacheError

__all__ = ["ShardName", "check_series", "is_series", "is_shard", "parse_group", "parse_shard"]

_SERIES = r"[a-z][a-z0-9_]{0,31}"
_GROUP = r"[1-9][0-9]{0,6}(?:x[1-9][0-9]{0,6}){0,3}"
_SHARD = re.compile(rf"({_SERIES})(?:-({_GROUP}))?-([0-9]{{5,9}})")


class ShardName(NamedTuple):
    """The parts of a shard's name. Sorts by group, then by number."""

    series: str
    group: tuple[int, ...]
    number: int

    @classmethod
    def of(cls, series: str, group: str, number: int) -> ShardName:
        """From the group as text, ``"49x480x720"`` or empty.

        Raises:
            ValueError: if these make no name.
        """
        return parse_shard(f"{series}-{group}-{number:05d}" if group else f"{series}-{number:05d}")

    @property
    def group_text(self) -> str:
        """``"49x480x720"``; empty for a shard without group."""
        return "x".join(map(str, self.group))

    def __str__(self) -> str:
        parts = [self.series, *([self.group_text] if self.group else []), f"{self.number:05d}"]
        return "-".join(parts)


def parse_shard(text: str, series: str | None = None) -> ShardName:
    """Read the name of a shard.

    Args:
        series: The series that it must belong to; None for any.

    Raises:
        ValueError: if it is not the name of a shard, of that series.
    """
    match = _SHARD.fullmatch(text)
    if match is None or (series is not None and match[1] != series):
        raise ValueError(f"{text!r:.80} is not a name for a shard of {series or 'any series'}")
    group = tuple(int(number) for number in match[2].split("x")) if match[2] else ()
    name = ShardName(match[1], group, int(match[3]))
    if str(name) != text:
        raise ValueError(f"{text!r:.80} is not spelt as the name of a shard")
    return name


def is_shard(text: str, series: str) -> bool:
    """Whether ``text`` can be a shard of that series."""
    try:
        parse_shard(text, series)
    except ValueError:
        return False
    return True


def parse_group(text: object) -> tuple[int, ...]:
    """``"49x480x720"`` as numbers.

    Raises:
        ValueError: if it is not a group.
    """
    if not isinstance(text, str) or not re.fullmatch(_GROUP, text):
        raise ValueError(f"{text!r:.40} is not a group")
    return tuple(int(number) for number in text.split("x"))


def is_series(name: str) -> bool:
    """Whether ``name`` can be a series: lower-case letters, digits and ``_``."""
    return re.fullmatch(_SERIES, name) is not None


def check_series(name: str) -> str:
    """Return ``name`` if it can be a series.

    Raises:
        CacheError: if not.
    """
    if not is_series(name):
        raise CacheError(f"{name!r:.80} is not a name for a series.")
    return name
