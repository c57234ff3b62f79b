"""``cache.json``: written first, and checked field by field before anything is added."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cogcache.cache.files import sync_folder, write_atomic
from cogcache.cache.format import (
    IDENTITY_FILE,
    MANIFEST_FILE,
    VERSION,
    Identity,
    differences,
    sort_buckets,
)
from cogcache.cache.lines import dump_sealed, load_sealed
from cogcache.cache.regular import read_regular
from cogcache.errors import CacheError, DamagedCacheError, MismatchError
from cogcache.location import Location

__all__ = ["admit", "check_buckets", "check_same", "check_version", "read_identity", "write_identity"]

_ANOTHER = "Choose another --shards folder, or delete this one."
_CONVERT = (
    "backend is what --format chooses; 'cogcache export --format' copies a cache into the other. To encode with these "
    "settings, choose another --shards folder, or delete this one."
)


def admit(root: Path, wanted: Identity) -> Identity:
    """Let a run with identity ``wanted`` into the cache in ``root``; the caller holds the cache lock.

    Returns the identity of the cache from now on: all series it had, and those that are new; its buckets, and new ones.

    Raises:
        MismatchError, DamagedCacheError, CacheError, StorageError: as :meth:`CacheWriter.open` says.
    """
    path = root / IDENTITY_FILE
    wanted = Identity.model_validate(wanted.model_dump(mode="json"))  # lists and tuples as they come back
    if not path.exists():
        _check_empty(root, wanted)
        merged = wanted
    else:
        found = read_identity(root)
        check_same(root, found, wanted, wanted.series.keys())
        check_buckets(root, found, wanted)
        merged = wanted.model_copy(update={"series": {**found.series, **wanted.series}})
        if merged == found:
            sync_folder(root)  # it may be just renamed by a killed process, and all folders rest on it
            return merged
    write_identity(root, merged)
    return merged


def write_identity(root: Path, identity: Identity) -> None:
    """Write ``cache.json``; the caller holds the cache lock."""
    write_atomic(root / IDENTITY_FILE, dump_sealed(identity.model_dump(mode="json")))


def read_identity(root: Path) -> Identity:
    """Read and check ``cache.json``.

    Raises:
        DamagedCacheError: if any byte of it is wrong.
        CacheError: if it is of a newer version.
    """
    path = root / IDENTITY_FILE
    try:
        value = load_sealed(read_regular(path))
        check_version(root, value)
        return Identity.model_validate(value)
    except (OSError, ValidationError, ValueError) as error:
        raise DamagedCacheError(
            f"{path} is damaged: {_short(error)}.", "Choose another --shards folder, or delete this one."
        ) from None


def check_version(root: Location, value: dict[str, Any]) -> None:
    """Refuse what a later version of this program wrote.

    Raises:
        CacheError: naming both versions.
    """
    version = value.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CacheError(
            f"{root} has cache format version {version}; this program knows up to {VERSION}.",
            "Update cogcache.",
        )


def _check_empty(root: Path, wanted: Identity) -> None:
    there = [name for name in (MANIFEST_FILE, *wanted.series) if (root / name).exists()]
    if there:
        raise DamagedCacheError(
            f"{root} holds {there[0]} but no {IDENTITY_FILE}.",
            "Choose another --shards folder, or delete this one.",
        )


def check_same(root: Location, found: Identity, wanted: Identity, series: Collection[str]) -> None:
    """Refuse where the model's facts differ, or a fingerprint of those of ``series`` that both have.

    Raises:
        MismatchError: naming every field.
    """
    shared = set(series) & wanted.series.keys() & found.series.keys()
    changed = differences(_fields(found, shared), _fields(wanted, shared))
    if changed:
        raise MismatchError(
            f"{root} was made with other settings, which never mix:",
            changed,
            _CONVERT if "backend" in changed else _ANOTHER,
        )


def check_buckets(root: Path, found: Identity, wanted: Identity) -> None:
    """Refuse a run that leaves out a bucket of the cache: its clips would all be placed and encoded anew.

    Raises:
        MismatchError: naming both lists.
    """
    missing = set(found.buckets) - set(wanted.buckets)
    if missing:
        flags = " ".join(f"--bucket {bucket}" for bucket in sort_buckets({*found.buckets, *wanted.buckets}))
        raise MismatchError(
            f"{root} has clips of other frame counts or sizes, which never go by accident:",
            {"buckets": (" ".join(found.buckets), " ".join(wanted.buckets))},
            f"Name the old ones, too ({flags}), or choose another --shards folder.",
        )


def _fields(identity: Identity, series: Collection[str]) -> dict[str, Any]:
    """All that must agree, flat; the model's id is only where it was found."""
    fields: dict[str, Any] = {"backend": identity.backend}
    variant = identity.model.variant.model_dump(mode="json")
    fields |= {f"model.{name}": value for name, value in variant.items()}
    for name in series:
        fields |= {f"series.{name}.{key}": value for key, value in identity.series[name].items()}
    return fields


def _short(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
