"""An entry as bytes, in the one spelling that does not depend on where it is kept.

Two backends hold equal entries if these bytes are equal; they are what a tar shard stores, and what travels when
entries are copied from one cache to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cogcache.cache.format import FORMAT, VERSION, Entry, Fingerprint, canonical_json
from cogcache.cache.lines import parse_object
from cogcache.variants import Variant

if TYPE_CHECKING:
    import torch

__all__ = ["Contents", "contents_of", "entry_of", "head_facts"]

Contents = tuple[bytes, bytes]
"""The tensors as a safetensors file, and the facts as canonical JSON."""


def contents_of(entry: Entry) -> Contents:
    """The bytes of an entry. Tensors are taken contiguous, in the dtype they come in."""
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()}
    return safetensors.torch.save(tensors), canonical_json(dict(entry.facts)).encode()


def entry_of(key: str, contents: Contents) -> Entry:
    """The entry that has these bytes.

    Raises:
        ValueError: if they are not a safetensors file and a JSON object.
    """
    return Entry(key=key, tensors=_load_tensors(contents[0]), facts=parse_object(contents[1]))


def _load_tensors(data: bytes) -> Mapping[str, torch.Tensor]:
    import safetensors
    import safetensors.torch

    try:
        tensors: dict[str, Any] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"not a safetensors file: {error}") from None
    return tensors


def head_facts(series: str, variant: Variant, fingerprint: Fingerprint) -> dict[str, Any]:
    """What every shard of a series says of itself first: enough to understand the file alone."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "series": series,
        "variant": variant.model_dump(mode="json"),
        "fingerprint": fingerprint,
    }
