"""What a stage of encoding works on, and what it has done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cogcache.cache.format import Entry

__all__ = ["Model", "Piece", "Raw", "Tally"]

Model = TypeVar("Model")
Raw = TypeVar("Raw")


@dataclass(frozen=True)
class Piece(Generic[Model, Raw]):
    """One entry to be made.

    Attributes:
        key: Its key.
        source: The file it comes from, for the failure ledger.
        group: Shape that it shares with all entries of its shard: ``49x480x720``.
        raw_id: Neighbours with the same one share a single ``read``.
        read: Runs in a thread; raises :class:`VideoError` if the file cannot be used.
        start: Gives the device its work without waiting for it, and returns what makes the entry of the result.
            That runs in the writing thread, waits for the device, and raises :class:`VideoError` if the result is of
            no use.
    """

    key: str
    source: str
    group: str
    raw_id: str
    read: Callable[[], Raw]
    start: Callable[[Model, Raw], Callable[[], Entry]]


@dataclass
class Tally:
    """What a stage did.

    Attributes:
        waited_s: How long the encoder had nothing to do because the next file was not read yet.
        seconds: From the first thing begun to the last entry written, loading of the model included.
    """

    encoded: int = 0
    failed: int = 0
    waited_s: float = 0.0
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        """Count another stage's work, too."""
        self.encoded += other.encoded
        self.failed += other.failed
        self.waited_s += other.waited_s
        self.seconds += other.seconds
