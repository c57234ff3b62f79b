"""What a check of a cache finds, how it is told, what a repair did, and what to do about a damaged shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cogcache.location import Location, Url
from cogcache.wording import counted

__all__ = ["Damage", "Repaired", "Report", "mend_hint"]


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong. ``file`` is relative to the cache; ``clips`` are sources that need it."""

    file: str
    what: str
    shard: str = ""
    key: str = ""
    clips: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = f" and {len(self.clips) - 3} more" if len(self.clips) > 3 else ""
        clips = f" [{', '.join(self.clips[:3])}{more}]" if self.clips else ""
        return f"{self.file}: {self.what}{f' (entry {self.key})' if self.key else ''}{clips}"


@dataclass
class Report:
    """The outcome of a check.

    Attributes:
        damages: Everything that is wrong; empty if the cache is whole.
        facts: What is no damage, yet worth knowing: files that belong to nothing, unfinished shards.
        counts: ``bytes``, ``shards``, ``entries``, ``samples``, ``failures``.
        decoded: One row for each clip that was encoded and decoded again.
    """

    root: str
    damages: list[Damage] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    decoded: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damages

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        return {**asdict(self), "whole": self.whole}

    def lines(self) -> list[str]:
        """The report for people, damages first."""
        count = self.counts
        first = (
            f"{self.root}: {counted(count.get('samples', 0), 'sample')}, "
            f"{counted(count.get('entries', 0), 'entry', 'entries')} in {counted(count.get('shards', 0), 'shard')}, "
            f"{count.get('bytes', 0) / 1e6:.1f} MB read.{' No damage.' if self.whole else ''}"
        )
        decoded = [
            f"decoded  {row['source']}: PSNR {row['psnr_db']:.1f} dB, latent error {row['latent_error']:.2g}"
            for row in self.decoded
        ]
        return [
            first,
            *(f"damaged  {damage}" for damage in self.damages),
            *decoded,
            *(f"note     {fact}" for fact in self.facts),
        ]


@dataclass
class Repaired:
    """What a repair did.

    Attributes:
        done: What was done, one line each.
        missing: Whether encode must run again: something was dropped, or cannot be known from what is left.
    """

    done: list[str] = field(default_factory=list)
    missing: bool = False


def mend_hint(folder: Location, shard: str) -> str:
    """What a user does about a damaged shard in the folder of its series."""
    if isinstance(folder, Url):
        return "Copy the cache there again; if it was damaged before, run 'cogcache verify --repair' on it first."
    return (
        f"Run 'cogcache verify {folder.parent} --repair', which keeps what is good of it, then encode again. "
        f"Or delete {shard}.* in {folder} and run encode again: it remakes all of that shard."
    )
