"""The tables and the manifest: how a commit of the whole cache switches from old to new at one instant.

A new table waits under ``<name>.next`` until the manifest that names its hash is in place. A reader therefore
looks at both names and takes the one with the right hash; the next commit settles what a kill left open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from cogcache.cache.files import remove, rename, sync_folder, write_atomic, write_file
from cogcache.cache.format import (
    FAILURES_FILE,
    IDENTITY_FILE,
    MANIFEST_FILE,
    SAMPLES_FILE,
    VALIDATION_FILE,
    FailureRecord,
    Identity,
    Manifest,
    Record,
    SampleRecord,
    SeriesRecord,
    TableRecord,
    ValidationRecord,
    canonical_json,
)
from cogcache.cache.identity import check_version
from cogcache.cache.lines import parse_json, parse_object, pretty_json
from cogcache.cache.regular import read_regular
from cogcache.cache.storage import LocalStorage, Storage
from cogcache.errors import CacheError, DamagedCacheError
from cogcache.location import Location

__all__ = [
    "commit_tables",
    "current_validation",
    "pending",
    "read_manifest",
    "read_table",
    "read_validation",
    "settle_tables",
    "waiting_tables",
]

_TABLES = (SAMPLES_FILE, FAILURES_FILE, VALIDATION_FILE)
_AGAIN = "Run encode again: it keeps every good shard and writes this anew."
R = TypeVar("R", bound=Record)


def commit_tables(
    root: Path,
    identity: Identity,
    series: Mapping[str, SeriesRecord],
    samples: Sequence[SampleRecord],
    failures: Sequence[FailureRecord],
    unconditional: str,
    validation: Sequence[ValidationRecord] = (),
) -> Manifest:
    """Write tables, then manifest; the caller holds the cache lock and has checked and sorted everything."""
    settle_tables(root)
    contents = {SAMPLES_FILE: _lines(samples), FAILURES_FILE: _lines(failures)}
    if validation:
        contents[VALIDATION_FILE] = _lines(validation)
    for name, data in contents.items():
        write_file(root / pending(name), data)
    sync_folder(root)
    tables = {
        name: TableRecord(rows=data.count(b"\n"), sha256=hashlib.sha256(data).hexdigest())
        for name, data in contents.items()
    }
    manifest = Manifest(
        backend=identity.backend,
        model=identity.model,
        series=dict(series),
        tables=tables,
        unconditional=unconditional,
    ).sealed()
    write_atomic(root / MANIFEST_FILE, pretty_json(manifest.model_dump(mode="json")))
    for name in contents:
        rename(root / pending(name), root / name)
    return manifest


def _lines(rows: Sequence[Record]) -> bytes:
    return "".join(canonical_json(row.model_dump(mode="json")) + "\n" for row in rows).encode()


def pending(name: str) -> str:
    """The name under which a table waits for its manifest."""
    return f"{name}.next"


def waiting_tables(root: Path) -> list[str]:
    """Tables that a stopped commit left under another name."""
    return [name for name in _TABLES if (root / pending(name)).exists()]


def settle_tables(root: Path) -> None:
    """Finish or undo what a killed commit left: a waiting table is good if the manifest names its hash.

    The caller holds the cache lock.
    """
    waiting = waiting_tables(root)
    if not waiting:
        return
    try:
        known = read_manifest(LocalStorage(root)).tables
    except CacheError:
        known = {}
    sync_folder(root)  # the manifest may be just renamed by a killed process
    for name in waiting:
        if name in known and _sha256(root / pending(name)) == known[name].sha256:
            rename(root / pending(name), root / name)
        else:
            remove(root / pending(name))


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_regular(path)).hexdigest()


def read_manifest(storage: Storage) -> Manifest:
    """Read the manifest and check its checksum.

    Raises:
        CacheError: if there is none, or it is of a newer version.
        DamagedCacheError: if any byte of it is wrong.
    """
    root, path = storage.root, storage.root / MANIFEST_FILE
    try:
        data = storage.read(MANIFEST_FILE)
    except FileNotFoundError:
        raise _missing(storage) from None
    except OSError as error:
        raise CacheError(
            f"{path} cannot be read: {error.strerror}.", "Check the path and its permissions."
        ) from None
    try:
        value = parse_object(data)
        check_version(root, value)
        manifest = Manifest.model_validate(value)
        if manifest.checksum != manifest.fingerprint() or data != pretty_json(
            manifest.model_dump(mode="json")
        ):
            raise ValueError("the checksum does not match")
    except (ValidationError, ValueError, RecursionError) as error:
        reason = f"{error.error_count()} wrong fields" if isinstance(error, ValidationError) else error
        raise DamagedCacheError(f"{path} is damaged: {reason}.", _AGAIN) from None
    return manifest


def _missing(storage: Storage) -> CacheError:
    root = storage.root
    if storage.size(IDENTITY_FILE) is not None:
        return CacheError(f"{root} has no {MANIFEST_FILE}: encode has not finished.", "Run encode again.")
    if isinstance(root, Path) and root.exists():
        return CacheError(
            f"{root} is not a cache: it has no {MANIFEST_FILE}.", "Give the folder that encode wrote."
        )
    return CacheError(f"there is no cache at {root}.", "Make one with 'cogcache encode'.")


def read_table(storage: Storage, manifest: Manifest, name: str, kind: type[R]) -> list[R]:
    """The rows of a table.

    Raises:
        DamagedCacheError: if it is not the one that the manifest names.
    """
    root, expected = storage.root, manifest.tables.get(name)
    if expected is None:
        raise DamagedCacheError(f"{root / MANIFEST_FILE} names no {name}.", _AGAIN)
    for candidate in (name, pending(name)):
        data = storage.read(candidate, expected.sha256) if storage.size(candidate) is not None else None
        if data is not None and hashlib.sha256(data).hexdigest() == expected.sha256:
            return _rows(root / name, data, expected.rows, kind)
    raise DamagedCacheError(f"{root / name} is missing or not the one that was committed.", _AGAIN)


def read_validation(storage: Storage, manifest: Manifest) -> list[ValidationRecord]:
    """The rows of ``validation.jsonl`` in their order; none where the manifest names no such table.

    Raises:
        DamagedCacheError: if it is not the one that the manifest names.
    """
    if VALIDATION_FILE not in manifest.tables:
        return []
    return read_table(storage, manifest, VALIDATION_FILE, ValidationRecord)


def current_validation(root: Path) -> list[ValidationRecord]:
    """Prompts for validation that are committed now; none where no manifest or table can be believed."""
    try:
        storage = LocalStorage(root)
        return read_validation(storage, read_manifest(storage))
    except CacheError:
        return []


def _rows(path: Location, data: bytes, count: int, kind: type[R]) -> list[R]:
    lines = data.split(b"\n")[:-1]
    try:
        values: list[Any] = parse_json(b"[" + b",".join(lines) + b"]")
        rows = [kind.model_validate(value) for value in values]
    except (ValidationError, ValueError) as error:
        raise DamagedCacheError(f"{path} is damaged: {error}.", _AGAIN) from None
    if len(rows) != count or len(lines) != count:
        raise DamagedCacheError(f"{path} is damaged: it has {len(rows)} rows, not {count}.", _AGAIN)
    return rows
