"""Whether an entry holds what its series says: tensor names, shapes, dtypes, finite values, facts.

Also what proves a key: it is a hash over the fingerprint and the content, so rows of a table and facts of an
entry can be checked against it where nothing else vouches for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogcache.cache.format import (
    IMAGES,
    LATENTS,
    TEXT,
    Entry,
    Fingerprint,
    canonical_json,
)
from cogcache.cache.keys import image_key, latent_key, text_key
from cogcache.cache.moments import MOMENTS, MOMENTS_8BIT, moments_of
from cogcache.cache.names import parse_group
from cogcache.cache.stored import Contents, entry_of
from cogcache.geometry import latent_frames
from cogcache.variants import Variant

__all__ = ["Expectation", "content_fault", "key_of_facts"]

_TENSORS = {LATENTS: MOMENTS, TEXT: "prompt_embeds", IMAGES: "latents"}
_DTYPES = {LATENTS: "vae_dtype", TEXT: "text_dtype", IMAGES: "vae_dtype"}
_GROUPS = {LATENTS: "bucket", IMAGES: "size"}
"""Which fact of an entry says its group."""
_GROUP_NUMBERS = {LATENTS: 3, TEXT: 1, IMAGES: 2}


@dataclass
class Expectation:
    """What the entries of one shard must hold.

    Args:
        group: What the shard's name says of their shape, ``"49x480x720"``; empty where it says nothing.
    """

    series: str
    variant: Variant
    fingerprint: Fingerprint
    group: str = ""

    def shape(self, facts: Mapping[str, Any]) -> tuple[int | None, ...] | None:
        """Shape of the tensor of an entry with these facts; None for a series that is not known.

        Lengths are None where neither shard nor facts tell.

        Raises:
            ValueError: if shard and facts disagree, or one of them tells no shape of this series.
        """
        numbers = self._numbers(facts)
        if self.series == TEXT:
            if numbers and numbers != [self.variant.text_length]:
                raise ValueError(f"it is in a shard of {self.group} tokens, not {self.variant.text_length}")
            return self.variant.text_length, self.variant.text_dim
        if self.series not in (LATENTS, IMAGES):
            return None
        channels, factor = self.variant.latent_channels, self.variant.spatial_factor
        picture = tuple(n // factor for n in numbers[-2:]) or (None, None)
        if self.series == IMAGES:
            return channels, 1, *picture
        length = latent_frames(numbers[0], self.variant.temporal_factor) if numbers else None
        return (3 if self.packed else 2) * channels, length, *picture

    @property
    def packed(self) -> bool:
        """Whether log-variances have 8 bits."""
        return self.series == LATENTS and self.fingerprint.get("log_variance") == "8bit"

    @property
    def tensor(self) -> str | None:
        """Name of the one tensor of an entry; None for a series that is not known."""
        return MOMENTS_8BIT if self.packed else _TENSORS.get(self.series)

    @property
    def dtype(self) -> str | None:
        """Dtype of that tensor; None where the fingerprint does not tell."""
        said = self.fingerprint.get(_DTYPES.get(self.series, ""))
        return "uint8" if self.packed else said if isinstance(said, str) else None

    def _numbers(self, facts: Mapping[str, Any]) -> list[int]:
        """The group as numbers; none where it is not known."""
        said = facts.get(_GROUPS.get(self.series, ""), self.group)
        if self.group and said != self.group:
            raise ValueError(f"its facts say {said!r:.40}, and it is in a shard of {self.group}")
        if not said:
            return []
        count = _GROUP_NUMBERS.get(self.series)
        numbers = parse_group(said)
        if count is not None and len(numbers) != count:
            raise ValueError(f"{said!r:.40} is not a group of {self.series}")
        return list(numbers)


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
    name = expected.tensor
    try:
        shape = expected.shape(entry.facts)
    except ValueError as error:
        return str(error)
    if name is not None and [*entry.tensors] != [name]:
        return f"it holds the tensors {sorted(entry.tensors)}, not {name!r}"
    for tensor in entry.tensors.values():
        if shape is not None and not _fits(tuple(tensor.shape), shape):
            return f"its tensor has the shape {list(tensor.shape)}, not {list(shape)}"
        if expected.dtype is not None and str(tensor.dtype) != f"torch.{expected.dtype}":
            return f"its tensor is {str(tensor.dtype).removeprefix('torch.')}, not {expected.dtype}"
    return _value_fault(expected, entry)


def _value_fault(expected: Expectation, entry: Entry) -> str:
    import torch

    values = [*entry.tensors.values()]
    if expected.packed:
        try:
            values = [moments_of(entry.tensors, expected.fingerprint.get("vae_dtype"))]
        except ValueError as error:
            return str(error)
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in values)
    return "" if finite else "its tensor holds values that are not finite"


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    same = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(w is None or f == w for f, w in same)


def key_of_facts(series: str, fingerprint: Fingerprint, facts: Mapping[str, Any]) -> str | None:
    """The key that an entry with these facts must have; None where the facts do not say."""
    try:
        if series == LATENTS:
            return latent_key(fingerprint, facts["sha256"], facts["window"], facts["bucket"])
        if series == TEXT:
            return text_key(fingerprint, facts["caption"])
        if series == IMAGES:
            return image_key(fingerprint, facts["image"], facts["size"], facts["draw"])
    except KeyError:
        pass
    return None
