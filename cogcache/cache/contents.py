"""Whether an entry holds what its series says: tensor names, shapes, dtypes, finite values, facts.

Also what proves a key: it is a hash over the fingerprint and the content, so rows of a table and facts of an
entry can be checked against it where nothing else vouches for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cogcache.cache.format import (
    IMAGES,
    LATENTS,
    TEXT,
    Entry,
    Fingerprint,
    SampleRecord,
    canonical_json,
    entry_key,
)
from cogcache.cache.stored import Contents, entry_of
from cogcache.geometry import parse_size
from cogcache.variants import Variant

__all__ = ["Expectation", "content_fault", "key_of_facts"]

_TENSORS = {LATENTS: "moments", TEXT: "prompt_embeds", IMAGES: "latents"}
_DTYPES = {LATENTS: "vae_dtype", TEXT: "text_dtype", IMAGES: "vae_dtype"}


@dataclass
class Expectation:
    """What the entries of one series must hold.

    Args:
        samples: Rows by key of their latent: they know the size of the clip.
    """

    series: str
    variant: Variant
    fingerprint: Fingerprint
    samples: Mapping[str, SampleRecord] = field(default_factory=dict)

    def shape(self, key: str) -> tuple[int | None, ...] | None:
        """Shape of the tensor, None for lengths that are not known; None for a series that is not known."""
        if self.series == TEXT:
            return self.variant.text_length, self.variant.text_dim
        channels = self.variant.latent_channels
        if self.series == IMAGES:
            _, _, height, width = self._latent_shape(key)
            return channels, 1, height, width
        return (2 * channels, *self._latent_shape(key)[1:]) if self.series == LATENTS else None

    def _latent_shape(self, key: str) -> tuple[int | None, ...]:
        row = self.samples.get(key) if self.series == LATENTS else None
        factor, time = self.variant.spatial_factor, self.variant.temporal_factor
        if row is not None:
            return 0, (row.frames - 1) // time + 1, row.height // factor, row.width // factor
        frames, size = self.fingerprint.get("frames"), self.fingerprint.get("size")
        length = (frames - 1) // time + 1 if isinstance(frames, int) else None
        if not isinstance(size, str) or "x" not in size:
            return 0, length, None, None
        picture = parse_size(size)
        return 0, length, picture.height // factor, picture.width // factor


def content_fault(expected: Expectation, key: str, contents: Contents) -> str:
    """What is wrong with an entry, given as bytes; empty if nothing is."""
    try:
        entry = entry_of(key, *contents)
    except ValueError as error:
        return str(error)
    if canonical_json(dict(entry.facts)).encode() != contents[1]:
        return "its facts are not canonical JSON"
    return _tensor_fault(expected, entry)


def _tensor_fault(expected: Expectation, entry: Entry) -> str:
    import torch

    name, shape = _TENSORS.get(expected.series), expected.shape(entry.key)
    if name is not None and [*entry.tensors] != [name]:
        return f"it holds the tensors {sorted(entry.tensors)}, not {name!r}"
    dtype = expected.fingerprint.get(_DTYPES.get(expected.series, ""))
    for tensor in entry.tensors.values():
        if shape is not None and not _fits(tuple(tensor.shape), shape):
            return f"its tensor has the shape {list(tensor.shape)}, not {list(shape)}"
        if isinstance(dtype, str) and str(tensor.dtype) != f"torch.{dtype}":
            return f"its tensor is {str(tensor.dtype).removeprefix('torch.')}, not {dtype}"
        if not bool(torch.isfinite(tensor).all()):
            return "its tensor holds values that are not finite"
    return ""


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    same = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(w is None or f == w for f, w in same)


def key_of_facts(series: str, fingerprint: Fingerprint, facts: Mapping[str, Any]) -> str | None:
    """The key that an entry with these facts must have; None where the facts do not say."""
    try:
        if series == LATENTS:
            return entry_key(fingerprint, source=facts["sha256"], window=facts["window"])
        if series == TEXT:
            return entry_key(fingerprint, caption=facts["caption"])
        if series == IMAGES:
            draw = "clean" if facts["draw"] is None else facts["draw"]
            return entry_key(fingerprint, image=facts["image"], draw=draw)
    except KeyError:
        pass
    return None
