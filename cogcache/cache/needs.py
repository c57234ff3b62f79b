"""Which entries the rows of a cache's tables need, and whether they are there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

from cogcache.cache.format import IMAGES, LATENTS, TEXT, SampleRecord, ValidationRecord
from cogcache.errors import CacheError

__all__ = ["Need", "check_complete", "needs_of", "needs_of_prompt"]

Need = tuple[str, str]
"""Series and key of an entry."""


class _Clip(Protocol):
    """A sample, or a clip that will be one."""

    @property
    def latents(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def images(self) -> tuple[str, ...]: ...


def needs_of(row: _Clip) -> list[Need]:
    """Every entry that a sample needs."""
    return [(LATENTS, row.latents), (TEXT, row.text), *((IMAGES, key) for key in row.images)]


def needs_of_prompt(prompt: ValidationRecord) -> list[Need]:
    """Every entry that a prompt for validation needs."""
    return [(TEXT, prompt.text), *([(IMAGES, prompt.image)] if prompt.image is not None else [])]


def check_complete(
    rows: Sequence[SampleRecord],
    unconditional: str,
    prompts: Sequence[ValidationRecord],
    keys: Mapping[str, Collection[str]],
) -> None:
    """Refuse tables that name an entry that is not there.

    Args:
        rows: Sorted by id.
        unconditional: Text key of the empty caption.
        keys: Series -> keys that are there.

    Raises:
        CacheError: naming the first entry, or an id that comes twice.
    """
    for before, row in pairwise(rows):
        if before.id == row.id:
            raise CacheError(f"two samples have the id {row.id!r} ({before.source} and {row.source}).")
    for (series, key), whose in _all_needs(rows, unconditional, prompts):
        if key not in keys.get(series, ()):
            raise CacheError(
                f"the cache is not complete: {whose} has no committed entry {key} in {series}.",
                "Run encode again; if another process is still encoding, wait for it first.",
            )


def _all_needs(
    rows: Sequence[SampleRecord], unconditional: str, prompts: Sequence[ValidationRecord]
) -> Iterator[tuple[Need, str]]:
    """Every need, with whose it is."""
    yield (TEXT, unconditional), "the empty caption"
    for row in rows:
        yield from ((need, row.source) for need in needs_of(row))
    for prompt in prompts:
        whose = f"the validation prompt {prompt.prompt!r:.60}"
        yield from ((need, whose) for need in needs_of_prompt(prompt))
