"""What a cache holds: its records, fingerprints and file names. Pure data, no I/O.

A cache is a folder::

    cache.json                       identity: what may be in here (written first)
    latents/latents-49x480x720-00000.tar   shards of one series and bucket; members are safetensors and JSON
    latents/latents-49x480x720-00000.index.jsonl   byte offsets and checksums; its presence commits the shard
    text/text-226-00000.tar ...
    samples.jsonl                    table: which clip uses which latent and which text entry
    failures.jsonl                   table: clips that could not be encoded, with reasons
    validation.jsonl                 table, only where prompts for validation were given
    journal.jsonl                    what happened, append-only
    manifest.json                    commit mark of the whole (written last)

Series hold *entries*, each under a key derived from everything that determines its bytes. Samples only
point at keys, so an edited caption changes one text entry and one row, never a latent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cogcache.errors import GeometryError
from cogcache.geometry import Bucket, parse_bucket
from cogcache.variants import Variant

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMAT",
    "SCHEMA",
    "VERSION",
    "BackendName",
    "Entry",
    "EntryRecord",
    "FailureRecord",
    "Identity",
    "Manifest",
    "MemberRecord",
    "ModelRecord",
    "SampleRecord",
    "SeriesRecord",
    "ShardRecord",
    "TableRecord",
    "ValidationRecord",
    "ZarrCompression",
    "canonical_json",
    "differences",
    "digest",
    "entry_key",
    "sort_buckets",
]

FORMAT: Final = "cogcache"
VERSION: Final = 1
SCHEMA: Final = 1
"""Part of every fingerprint: changes when entries are made in another way that no other field tells."""

IDENTITY_FILE = "cache.json"
MANIFEST_FILE = "manifest.json"
SAMPLES_FILE = "samples.jsonl"
FAILURES_FILE = "failures.jsonl"
VALIDATION_FILE = "validation.jsonl"
JOURNAL_FILE = "journal.jsonl"

MAX_SLOTS = 1 << 20
"""Entries of a shard at most, where their number is fixed: each takes up memory and space, used or not."""

LATENTS = "latents"
TEXT = "text"
IMAGES = "images"

BackendName = Literal["webdataset", "zarr"]
"""How shards are stored, :mod:`cogcache.cache.backend`."""

ZarrCompression = Literal["zstd", "none"]
"""How chunks of zarr shards are compressed."""

Fingerprint = dict[str, Any]
"""Everything that determines the bytes of a series, as flat readable fields."""


@dataclass(frozen=True)
class Entry:
    """One cached result.

    ``latents``: ``{"moments": [2C, F, H, W]}``, unscaled posterior mean and log-variance, or ``{"moments_8bit":
    [3C, F, H, W]}``, :mod:`cogcache.cache.moments`.
    ``text``: ``{"prompt_embeds": [L, D]}``. ``images``: ``{"latents": [C, 1, H, W]}``, unscaled.
    ``facts`` is a JSON object (source, frame times, caption...).
    """

    key: str
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Record(BaseModel):
    """Base of all records on disk: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRecord(Record):
    """The base model a cache was made for: hub id or folder as given, and its facts."""

    id: str
    variant: Variant


class Identity(Record):
    """``cache.json``: what may be in this folder. Checked field by field before anything is added.

    ``buckets`` are all that clips have ever been placed in, as ``49x480x720``, sorted as numbers.
    """

    format: Literal["cogcache"] = FORMAT
    version: Literal[1] = VERSION
    backend: BackendName = "webdataset"
    model: ModelRecord
    series: dict[str, Fingerprint]
    buckets: tuple[str, ...] = ()

    @field_validator("buckets")
    @classmethod
    def _buckets_are_sorted(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if sort_buckets(value) != value:
            raise ValueError("not a sorted list of buckets")
        return value


class MemberRecord(Record):
    """One member of an entry: ``offset`` and ``size`` in bytes of its data within the shard file."""

    name: str
    offset: int = Field(ge=0)
    size: int = Field(ge=0)
    crc32: int = Field(ge=0)


class EntryRecord(Record):
    """One line of a shard's index."""

    key: str
    members: tuple[MemberRecord, ...]


class ShardRecord(Record):
    """One committed shard, ``name`` without suffix. Hashes are hex sha256 of whole files."""

    name: str
    entries: int
    bytes: int
    sha256: str
    index_sha256: str


class SeriesRecord(Record):
    """All shards of a series and the fingerprint they share."""

    fingerprint: Fingerprint
    shards: tuple[ShardRecord, ...]


Length = Annotated[int, Field(ge=1, le=999_999)]
"""A side of a bucket, as its name can say it."""


class SampleRecord(Record):
    """One row of ``samples.jsonl``: a clip, its caption, and the entries that hold them.

    ``source`` is relative to the data root, with ``/``, and ``sha256`` the hash of its content; ``window`` names the
    part of the video.
    ``fps`` is the rate at which frames were picked, ``None`` where every frame of the source was kept.
    ``latents`` and ``text`` are keys, ``images`` the keys of the image-condition bank in draw order.
    """

    id: str
    source: str
    sha256: str
    window: str
    caption: str
    frames: Length
    height: Length
    width: Length
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    latents: str
    text: str
    images: tuple[str, ...] = ()

    @property
    def bucket(self) -> Bucket:
        """Shape of the clip: batches never mix two."""
        return Bucket(self.frames, self.height, self.width)


class FailureRecord(Record):
    """One row of ``failures.jsonl``."""

    id: str
    source: str
    window: str
    reason: str


class ValidationRecord(Record):
    """One row of ``validation.jsonl``: a prompt to sample videos from during training.

    ``text`` is the key of its embedding, ``image`` that of the noise-free first frame in ``images`` and
    ``image_name`` the picture as listed; both None for text-to-video.
    """

    prompt: str
    text: str
    image: str | None = None
    image_name: str | None = None


class TableRecord(Record):
    """A table beside the manifest: its rows and the hex sha256 of the file."""

    rows: int
    sha256: str


class Manifest(Record):
    """``manifest.json``: the commit mark of a whole cache, written last.

    ``unconditional`` is the text key of the empty caption. ``checksum`` is :func:`digest` of all
    other fields.
    """

    format: Literal["cogcache"] = FORMAT
    version: Literal[1] = VERSION
    backend: BackendName = "webdataset"
    model: ModelRecord
    series: dict[str, SeriesRecord]
    tables: dict[str, TableRecord]
    unconditional: str
    checksum: str = ""

    def fingerprint(self) -> str:
        """What a LoRA file records of the data it was trained on: the checksum of all fields."""
        return digest(self.model_dump(mode="json", exclude={"checksum"}))

    def sealed(self) -> Manifest:
        """A copy whose ``checksum`` is right."""
        return self.model_copy(update={"checksum": self.fingerprint()})


def sort_buckets(buckets: Iterable[str]) -> tuple[str, ...]:
    """Each bucket once, spelt ``49x480x720``, sorted as numbers.

    Raises:
        ValueError: if one is not a bucket.
    """
    try:
        return tuple(map(str, sorted({parse_bucket(text) for text in buckets})))
    except GeometryError as error:
        raise ValueError(error.message) from None


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Hex sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def entry_key(fingerprint: Fingerprint, **content: Any) -> str:
    """The key of an entry: 32 hex digits that change when anything that determines its bytes does."""
    return digest({"fingerprint": fingerprint, "content": content})[:32]


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields in which two flat records differ, as name -> (was, is)."""
    names = sorted(was.keys() | now.keys())
    return {n: (was.get(n), now.get(n)) for n in names if was.get(n) != now.get(n)}
