"""An entry as bytes, in the one spelling that does not depend on where it is kept.

Two backends hold equal entries if these bytes are equal; they are what a tar shard stores, and what travels when
entries are copied from one cache to another.
"""

from __future__ import annotations

from typing import Any

from cogcache.cache.format import FORMAT, VERSION, Entry, Fingerprint, canonical_json
from cogcache.cache.lines import parse_object
from cogcache.cache.tensors import Buffer, dump_tensors, load_tensors
from cogcache.variants import Variant

__all__ = ["Contents", "contents_of", "entry_of", "head_facts"]

Contents = tuple[bytes, bytes]
"""The tensors as a safetensors file, and the facts as canonical JSON."""


def contents_of(entry: Entry) -> Contents:
    """The bytes of an entry. Tensors are taken contiguous, in the dtype they come in."""
    return dump_tensors(entry.tensors), canonical_json(dict(entry.facts)).encode()


def entry_of(key: str, tensors: Buffer, facts: Buffer) -> Entry:
    """The entry that has these bytes; its tensors share them where they can be written to.

    Raises:
        ValueError: if they are not a safetensors file and a JSON object.
    """
    return Entry(key=key, tensors=load_tensors(tensors), facts=parse_object(bytes(facts)))


def head_facts(series: str, variant: Variant, fingerprint: Fingerprint) -> dict[str, Any]:
    """What every shard of a series says of itself first: enough to understand the file alone."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "series": series,
        "variant": variant.model_dump(mode="json"),
        "fingerprint": fingerprint,
    }
