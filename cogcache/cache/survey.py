"""What of a cache can be believed when some of it cannot: identity, manifest, tables, names of shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from cogcache.cache.backend import BACKENDS, Backend, backend_of, data_files
from cogcache.cache.damage import Damage
from cogcache.cache.format import (
    FAILURES_FILE,
    IDENTITY_FILE,
    LATENTS,
    MANIFEST_FILE,
    SAMPLES_FILE,
    TEXT,
    VALIDATION_FILE,
    BackendName,
    FailureRecord,
    Identity,
    Manifest,
    ModelRecord,
    Record,
    SampleRecord,
    ShardRecord,
    ValidationRecord,
    canonical_json,
    digest,
    sort_buckets,
)
from cogcache.cache.identity import read_identity
from cogcache.cache.keys import latent_key, text_key
from cogcache.cache.lines import parse_object
from cogcache.cache.names import is_series, is_shard, parse_shard
from cogcache.cache.regular import open_regular, read_regular
from cogcache.cache.storage import LocalStorage
from cogcache.cache.tables import read_manifest, read_table
from cogcache.errors import CacheError
from cogcache.variants import Variant

__all__ = ["SeriesShards", "Survey", "survey"]

R = TypeVar("R", bound=Record)
_INDEX = ".index.jsonl"
_MOST_LISTED = 100_000
"""A video is not looked for in a list more often than this when a row proves its id."""


@dataclass
class SeriesShards:
    """Shards of a series by name: those that the manifest names, and those on disk."""

    named: dict[str, ShardRecord] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """All of them, by group and number."""
        return sorted({*self.named, *self.found}, key=parse_shard)


@dataclass
class Survey:
    """What was found. Attributes are None where a file is missing or cannot be believed.

    ``side_files`` are names of files that tell other programs of the cache; a check fills them in.
    ``rows`` are proven by the manifest, or where there is none, by themselves.
    """

    root: Path
    identity: Identity | None = None
    identity_lost: bool = False
    manifest: Manifest | None = None
    samples: list[SampleRecord] | None = None
    failures: list[FailureRecord] | None = None
    validation: list[ValidationRecord] | None = None
    shards: dict[str, SeriesShards] = field(default_factory=dict)
    damages: list[Damage] = field(default_factory=list)
    side_files: set[str] = field(default_factory=set)

    @property
    def backend(self) -> Backend:
        """How the shards are stored."""
        return backend_of(self.identity.backend if self.identity else BACKENDS[0])

    def add(self, file: str, what: str) -> None:
        """Note a damage."""
        self.damages.append(Damage(file, what))


def survey(root: Path) -> Survey:
    """Read everything but the shards. Nothing is changed.

    Raises:
        CacheError: if there is no cache in ``root``, or one of a later version.
    """
    seen = Survey(root)
    seen.manifest = _believed(seen, MANIFEST_FILE, lambda: read_manifest(LocalStorage(root)))
    _find_identity(seen)
    _find_shards(seen)
    _read_tables(seen)
    return seen


def _believed(seen: Survey, name: str, read: Callable[[], R]) -> R | None:
    try:
        return read()
    except CacheError as error:
        if "version" in error.message and error.hint == "Update cogcache.":
            raise
        missing = not (seen.root / name).exists()
        known = (IDENTITY_FILE, MANIFEST_FILE, SAMPLES_FILE)
        if missing and not any((seen.root / n).exists() for n in known) and not _shard_files(seen.root):
            raise CacheError(
                f"{seen.root} is not a cache.", "Give the folder that 'cogcache encode' wrote."
            ) from None
        if not missing:
            what = error.message.removeprefix(f"{seen.root / name} ").rstrip(".")
        elif name == MANIFEST_FILE:
            what = "it is missing: encode has not finished, or it was lost"
        else:
            what = "it is missing"
        seen.add(name, what)
        return None


def _shard_files(root: Path) -> list[tuple[BackendName, str, Path]]:
    """Committed data files of all backends: backend, shard, path."""
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted(
        (name, shard, path)
        for name in BACKENDS
        for folder in folders
        for shard, tail, path in data_files(backend_of(name), folder)
        if not tail
    )


def _find_identity(seen: Survey) -> None:
    seen.identity = _believed(seen, IDENTITY_FILE, lambda: read_identity(seen.root))
    manifest = seen.manifest
    if seen.identity is None:
        seen.identity_lost = True
        seen.identity = _identity_of(manifest) if manifest else _identity_of_shards(seen.root)
        return
    if manifest is None:
        return
    one, other = seen.identity, manifest
    same = one.model.variant == other.model.variant and one.backend == other.backend
    series = {name: seen.identity.series.get(name) for name in manifest.series}
    if not same or series != {name: record.fingerprint for name, record in manifest.series.items()}:
        seen.add(MANIFEST_FILE, f"it is of another cache than {IDENTITY_FILE}")


def _identity_of(manifest: Manifest) -> Identity:
    series = {name: record.fingerprint for name, record in manifest.series.items()}
    names = [shard.name for record in manifest.series.values() for shard in record.shards]
    return Identity(backend=manifest.backend, model=manifest.model, series=series, buckets=_buckets(names))


def _buckets(shards: Iterable[str]) -> tuple[str, ...]:
    """What the names of shards of latents tell: buckets that hold no clip are in no name."""
    names = (parse_shard(shard) for shard in shards if is_shard(shard, LATENTS))
    return sort_buckets(name.group_text for name in names if len(name.group) == 3)


def _identity_of_shards(root: Path) -> Identity | None:
    """What most shards of each series say of themselves; the model's id is in none of them."""
    votes: dict[str, Counter[str]] = {}
    variants: Counter[str] = Counter()
    backends: Counter[BackendName] = Counter()
    files = _shard_files(root)
    for backend, shard, path in files:
        try:
            with open_regular(path) as stream:
                said = backend_of(backend).read_head(stream, path.stat().st_size)
            variant = Variant.model_validate(said["variant"])
            fingerprint = said["fingerprint"]
            series = parse_shard(shard).series
            if said["series"] != series or not isinstance(fingerprint, dict):
                continue
        except (OSError, ValueError, KeyError):
            continue
        backends[backend] += 1
        variants[variant.model_dump_json()] += 1
        votes.setdefault(series, Counter())[canonical_json(fingerprint)] += 1
    if not variants:
        return None
    prints = {name: parse_object(votes[name].most_common(1)[0][0].encode()) for name in sorted(votes)}
    model = ModelRecord(id="unknown", variant=Variant.model_validate_json(variants.most_common(1)[0][0]))
    buckets = _buckets(shard for _, shard, _ in files)
    return Identity(backend=backends.most_common(1)[0][0], model=model, series=prints, buckets=buckets)


def _find_shards(seen: Survey) -> None:
    named = seen.manifest.series if seen.manifest else {}
    series = {*named, *(seen.identity.series if seen.identity else ())}
    for name in sorted(series):
        if not is_series(name):
            seen.add(MANIFEST_FILE, f"{name!r:.80} is not a name for a series")
            continue
        shards = seen.shards[name] = SeriesShards()
        for record in named[name].shards if name in named else ():
            try:
                parse_shard(record.name, name)
                shards.named[record.name] = record
            except ValueError as error:
                seen.add(MANIFEST_FILE, str(error))
        shards.found = _on_disk(seen.root / name, seen.backend, lost_indexes=seen.manifest is None)


def _on_disk(folder: Path, backend: Backend, *, lost_indexes: bool) -> list[str]:
    """Names of committed shards, and of those that may have lost their index: a data file and nothing else.

    Where a manifest names the shards, a data file that it does not name and that has no index is no part of the cache.
    """
    if not folder.is_dir():
        return []
    files = {path.name for path in folder.iterdir()}
    committed = {name.removesuffix(_INDEX) for name in files if name.endswith(_INDEX)}
    lost = {shard for shard, tail, _ in data_files(backend, folder) if not tail} if lost_indexes else ()
    unsure = {n for n in lost if not {f"{n}.plan.json", f"{n}.index.part", f"{n}.index.damaged"} & files}
    return sorted(name for name in committed | unsure if is_shard(name, folder.name))


def _read_tables(seen: Survey) -> None:
    seen.samples = _table(seen, SAMPLES_FILE, SampleRecord)
    seen.failures = _table(seen, FAILURES_FILE, FailureRecord)
    manifest = seen.manifest
    if manifest is None or VALIDATION_FILE in manifest.tables:
        seen.validation = _table(seen, VALIDATION_FILE, ValidationRecord)
    else:
        seen.validation = []
    if manifest is None and seen.identity is not None:
        seen.samples = _proven(seen.samples, seen.identity)
        fingerprint = seen.identity.series.get(TEXT, {})
        rows = seen.validation or []
        right = all(row.text == text_key(fingerprint, row.prompt) for row in rows)
        seen.validation = rows if right else None


def _table(seen: Survey, name: str, kind: type[R]) -> list[R] | None:
    if seen.manifest is None:
        return _loose_rows(seen.root / name, kind)
    manifest = seen.manifest
    try:
        return read_table(LocalStorage(seen.root), manifest, name, kind)
    except CacheError as error:
        seen.add(name, error.message.removeprefix(f"{seen.root / name} ").rstrip("."))
        return None


def _loose_rows(path: Path, kind: type[R]) -> list[R] | None:
    """Rows of a table that nothing vouches for, None unless every one of them is spelt as a writer spells it."""
    try:
        lines = read_regular(path).split(b"\n")
        rows = [kind.model_validate(parse_object(line)) for line in lines[:-1]]
    except (OSError, ValidationError, ValueError):
        return None
    spelt = [canonical_json(row.model_dump(mode="json")).encode() for row in rows]
    return rows if [*spelt, b""] == lines else None


def _proven(rows: Sequence[SampleRecord] | None, identity: Identity) -> list[SampleRecord] | None:
    """Rows whose ids and keys agree with what they say; None unless all do."""
    if rows is None or [row.id for row in rows] != sorted({row.id for row in rows}):
        return None
    listed = Counter((row.source, row.window) for row in rows)
    return list(rows) if all(_proves_itself(row, listed, identity) for row in rows) else None


def _proves_itself(row: SampleRecord, listed: Counter[tuple[str, str]], identity: Identity) -> bool:
    made = identity.series.get(LATENTS, {})
    fps = row.fps or "source"
    if made.get("fps", fps) != fps:
        return False
    if row.latents != latent_key(made, row.sha256, row.window, row.bucket):
        return False
    tries = min(_MOST_LISTED, listed[row.source, row.window] + 1000)
    return row.text == text_key(identity.series.get(TEXT, {}), row.caption) and any(
        row.id == digest([row.source, row.window, number])[:16] for number in range(tries)
    )
