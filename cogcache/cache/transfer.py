"""From finished caches to a new one: a subset, or several joined. Nothing is encoded; entries are copied byte for byte.

The new cache is written as any other: a stopped run is taken up by the same command, and equal choices from equal
caches give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from cogcache.cache.format import (
    IMAGES,
    LATENTS,
    MANIFEST_FILE,
    TEXT,
    BackendName,
    FailureRecord,
    Identity,
    Manifest,
    SampleRecord,
    ValidationRecord,
    ZarrCompression,
    sort_buckets,
)
from cogcache.cache.identity import check_same
from cogcache.cache.names import parse_shard
from cogcache.cache.reader import CacheReader
from cogcache.cache.tables import waiting_tables
from cogcache.cache.writer import CacheWriter
from cogcache.errors import CacheError, MismatchError
from cogcache.geometry import parse_bucket
from cogcache.location import Location
from cogcache.progress import Progress

__all__ = ["choose", "export_shards", "merge_shards"]


def export_shards(
    shards: Location | str,
    out: Path,
    *,
    query: str = "",
    bucket: str = "",
    names: Path | None = None,
    limit: int | None = None,
    backend: BackendName | None = None,
    compression: ZarrCompression = "zstd",
) -> Manifest:
    """Write the chosen samples as a cache of their own; prompts for validation come along, failures do not.

    Args:
        query, bucket, names, limit: As :func:`choose` says; ``names`` is a UTF-8 file, one a line.
        backend: How the new cache is stored; None for as the old one.
        compression: Of zarr arrays.

    Raises:
        GeometryError: if ``bucket`` is none.
        CacheError: if nothing is chosen, a name is unknown, or ``out`` is a finished cache.
        DamagedCacheError: if an entry is not the one that was committed.
        StorageError: if the new cache cannot be written.
    """
    reader = CacheReader(shards)
    wanted = None if names is None else _lines(names)
    rows = choose(reader.samples, query=query, bucket=bucket, names=wanted, limit=limit)
    if not rows:
        raise CacheError(f"no sample of {shards} is chosen.", "See what there is: cogcache inspect.")
    identity = _identity(reader, backend)
    return _write(out, identity, [reader], rows, [], reader.validation, compression)


def choose(
    samples: Sequence[SampleRecord],
    *,
    query: str = "",
    bucket: str = "",
    names: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[SampleRecord]:
    """The samples that all of these let through, in order.

    Args:
        query: Words that caption or source must all hold, in any case.
        bucket: Frames x height x width: ``49x480x720``.
        names: Sources or ids.
        limit: At most so many, the first by id.

    Raises:
        GeometryError: if ``bucket`` is none.
        CacheError: if a name is neither a source nor an id.
    """
    words = query.casefold().split()
    shape = parse_bucket(bucket) if bucket else None
    known = {name for row in samples for name in (row.source, row.id)}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CacheError(f"{unknown[0]!r:.200}{more} is neither a source nor an id.", "Mend the list.")
    listed = None if names is None else set(names)
    found = [
        row
        for row in samples
        if (shape is None or row.bucket == shape)
        and (listed is None or not listed.isdisjoint((row.source, row.id)))
        and all(word in f"{row.caption}\n{row.source}".casefold() for word in words)
    ]
    return found[:limit]


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be read: {error}", "Give a text file, one name a line.") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def merge_shards(
    out: Path,
    shards: Sequence[Location | str],
    *,
    backend: BackendName | None = None,
    compression: ZarrCompression = "zstd",
) -> Manifest:
    """Join caches of equal fingerprints. What is in more than one of them is taken once.

    A clip that failed in one and is in another has not failed. Prompts for validation are joined in order.

    Args:
        backend: How the new cache is stored; None for as the old ones, which must agree then.
        compression: Of zarr arrays.

    Raises:
        MismatchError: if two were made with other settings; lists every field as "was / is".
        CacheError: if two samples of one id differ, or ``out`` is a finished cache.
        DamagedCacheError: if an entry is not the one that was committed.
        StorageError: if the new cache cannot be written.
    """
    readers = [CacheReader(root) for root in shards]
    for first, second in pairwise(readers):
        _check_joinable(first, second, backend)
    rows: dict[str, tuple[SampleRecord, Location]] = {}
    for reader in readers:
        for row in reader.samples:
            same, root = rows.setdefault(row.id, (row, reader.root))
            if same != row:
                fields = same.model_dump(), row.model_dump()
                differing = {
                    n: (fields[0][n], fields[1][n]) for n in fields[0] if fields[0][n] != fields[1][n]
                }
                raise MismatchError(
                    f"sample {row.id} ({row.source}) of {root} is another in {reader.root}:",
                    differing,
                    "Keep one: export the others of one cache, then merge.",
                )
    failures = {row.id: row for reader in reversed(readers) for row in reader.failures if row.id not in rows}
    prompts = list(dict.fromkeys(row for reader in readers for row in reader.validation))
    identity = _identity(readers[0], backend)
    return _write(
        out,
        identity,
        readers,
        [row for row, _ in rows.values()],
        list(failures.values()),
        prompts,
        compression,
    )


def _identity(reader: CacheReader, backend: BackendName | None) -> Identity:
    series = {name: value.fingerprint for name, value in reader.manifest.series.items()}
    return Identity(backend=backend or reader.manifest.backend, model=reader.manifest.model, series=series)


def _check_joinable(first: CacheReader, second: CacheReader, backend: BackendName | None) -> None:
    one, other = _identity(first, backend), _identity(second, backend)
    fields: Mapping[str, tuple[object, object]] = {}
    try:
        check_same(first.root, one, other, other.series.keys())
    except MismatchError as error:
        fields = error.differences
    if one.series.keys() != other.series.keys():
        fields = {**fields, "series": (sorted(one.series), sorted(other.series))}
    if fields:
        raise MismatchError(
            f"{first.root} and {second.root} were made with other settings, which never mix:",
            fields,
            "Give --format to make one of both."
            if fields.keys() == {"backend"}
            else "Encode both with the same settings.",
        )


def _write(
    out: Path,
    identity: Identity,
    readers: Sequence[CacheReader],
    rows: Sequence[SampleRecord],
    failures: Sequence[FailureRecord],
    prompts: Sequence[ValidationRecord],
    compression: ZarrCompression,
) -> Manifest:
    if (out / MANIFEST_FILE).exists() and not waiting_tables(out):  # with these, it was stopped in its commit
        raise CacheError(f"{out} holds a finished cache.", "Choose another folder.")
    unconditional = readers[0].manifest.unconditional
    texts = [unconditional, *(row.text for row in rows), *(row.text for row in prompts)]
    images = [key for row in rows for key in row.images] + [row.image for row in prompts if row.image]
    wanted = {LATENTS: [row.latents for row in rows], TEXT: texts, IMAGES: images}
    buckets = sort_buckets({str(row.bucket) for row in rows})
    writer = CacheWriter.open(out, identity.model_copy(update={"buckets": buckets}), compression)
    for series in sorted(writer.identity.series):
        _copy(writer, readers, series, list(dict.fromkeys(wanted.get(series, []))))
    return writer.commit(rows, failures, unconditional, prompts)


def _copy(writer: CacheWriter, readers: Sequence[CacheReader], series: str, keys: Sequence[str]) -> None:
    """Group by group, in shards as large as the largest of that group in the caches that they come from."""
    holders: dict[str, CacheReader] = {}
    groups: dict[str, str] = {}
    for reader in reversed(readers):
        for group, members in reader.groups(series).items():
            holders.update(dict.fromkeys(members, reader))
            groups.update(dict.fromkeys(members, group))
    largest: dict[str, int] = {}
    for shard in (shard for reader in readers for shard in reader.manifest.series[series].shards):
        group = parse_shard(shard.name, series).group_text
        largest[group] = max(shard.entries, largest.get(group, 1))
    for group in sorted({groups[key] for key in keys}):
        writer.plan(series, [key for key in keys if groups[key] == group], largest[group], group)
    with Progress(f"Copying {series}", len(keys), "entries") as progress:
        for job in writer.jobs(series, set(keys)):
            with job:
                for key in job.remaining:
                    job.copy(key, holders[key].contents(series, key))
                    progress.advance()
                job.finish()
