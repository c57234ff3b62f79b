"""``cogcache verify --repair``: keep what is good, drop what is damaged, so that encode remakes just that.

Nothing good is removed before its copy is durable: a damaged shard is set aside under names of its own, its good
entries go into a new shard by the usual commit protocol, and only then does it go. Stopped anywhere in between,
the next repair goes on, and the next encode works too. What cannot be proven good is not kept, but for shards of
which nothing vouches any more (index and manifest both lost): those are taken as they are, and this is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cogcache.cache.backend import DAMAGED, PART, Backend, backend_of
from cogcache.cache.check import Checked
from cogcache.cache.damage import Repaired
from cogcache.cache.files import remove, rename, write_atomic
from cogcache.cache.folder import SeriesFolder
from cogcache.cache.format import (
    JOURNAL_FILE,
    MANIFEST_FILE,
    EntryRecord,
    Identity,
)
from cogcache.cache.identity import write_identity
from cogcache.cache.index import parse_index
from cogcache.cache.journal import Journal
from cogcache.cache.lines import seal_line
from cogcache.cache.lock import cache_lock
from cogcache.cache.mend_tables import mend_tables
from cogcache.cache.names import ShardName, parse_shard
from cogcache.cache.regular import open_regular, read_regular
from cogcache.cache.shard_check import ShardFinding, read_contents, records_of
from cogcache.cache.tables import settle_tables
from cogcache.cache.writer import CacheWriter
from cogcache.errors import CacheError

__all__ = ["repair_cache"]


def repair_cache(
    checked: Checked, model_id: str | None = None, advance: Callable[[int], object] = lambda _: None
) -> Repaired:
    """Make the cache valid again.

    Args:
        checked: Outcome of a check of the cache just now.
        model_id: The base model's id, for a ``cache.json`` that is rebuilt from shards, which do not tell it.
        advance: Told how many bytes of shards more were read.

    Raises:
        CacheError: if another process fills the cache, or nothing is left to repair from.
        StorageError: if the disk refuses; the next repair goes on.
    """
    root, result = checked.seen.root, Repaired()
    identity = _mend_identity(checked, model_id, result)
    folders = {series: SeriesFolder(root, identity, series) for series in identity.series}
    _condemn(checked)
    with cache_lock(root):
        _refuse_busy(root, folders)
        if checked.seen.manifest is not None:
            settle_tables(root)
        _drop_plans(checked, folders, result)
        known = {r.key for f in checked.findings if not f.index_lost for r in f.good}
        changed = [finding for finding in checked.findings if not _mend_shard(root, finding, known, result)]
        if changed:
            remove(root / MANIFEST_FILE)  # it names what will not be there any more
        for finding in changed:
            _set_aside(root / finding.series, finding)
    writer = CacheWriter.open(root, identity)
    for series in folders:
        _take_good(root, writer, series, result)
    if any(damage.file in checked.seen.side_files for damage in checked.report.damages):
        writer.refresh()
        result.done.append("what tells other programs of the cache was written anew")
    mend_tables(checked, identity, advance, result)
    if any(damage.file == JOURNAL_FILE for damage in checked.report.damages):
        _mend_journal(root, result)
    return result


def _mend_identity(checked: Checked, model_id: str | None, result: Repaired) -> Identity:
    seen = checked.seen
    if seen.identity is None:
        raise CacheError(
            f"nothing in {seen.root} says what it is: no manifest, no cache.json, no whole shard.",
            "Delete it and run encode again.",
        )
    identity = seen.identity
    if seen.identity_lost:
        if seen.manifest is None and model_id:
            identity = identity.model_copy(
                update={"model": identity.model.model_copy(update={"id": model_id})}
            )
        with cache_lock(seen.root):
            write_identity(seen.root, identity)
        source = MANIFEST_FILE if seen.manifest else "the first member of the shards"
        result.done.append(f"cache.json was rebuilt from {source}")
    return identity


def _condemn(checked: Checked) -> None:
    """Entries whose checksums are right, but that were found to be wrong otherwise, are not good."""
    wrong = {
        (damage.file, damage.key) for damage in checked.report.damages if damage.key and not damage.shard
    }
    for finding in checked.findings:
        bad = [record for record in finding.good if (finding.series, record.key) in wrong]
        for record in bad:
            finding.good.remove(record)
            finding.data_whole = False
            finding.damage("it is not what its key says", record.key)


def _refuse_busy(root: Path, folders: dict[str, SeriesFolder]) -> None:
    if any(folder.is_claimed(name) for folder in folders.values() for name in folder.unfinished()):
        raise CacheError(f"another process is filling {root}.", "Wait for it to end, then repair.")


def _drop_plans(checked: Checked, folders: dict[str, SeriesFolder], result: Repaired) -> None:
    """An unfinished shard whose plan is damaged cannot be gone on with."""
    bad = {(d.file.split("/")[0], d.shard) for d in checked.report.damages if d.file.endswith(".plan.json")}
    for series, name in sorted(bad):
        path = checked.seen.root / series
        data = path / f"{checked.seen.backend.data_file(name)}{PART}"
        remove(data, path / f"{name}.index.part")
        remove(path / f"{name}.plan.json")
        if series in folders:
            remove(path / f".{name}.lock")
        result.done.append(f"the unfinished shard {name} was dropped: its plan is damaged")
        result.missing = True


def _mend_shard(root: Path, finding: ShardFinding, known: set[str], result: Repaired) -> bool:
    """Whether the shard is whole now: it was, or only its index had to be made again.

    ``known`` are keys of shards that have their index: after a loss, encode may have made entries again.
    """
    if not finding.damages:
        return True
    if not (finding.data_whole and finding.good and known.isdisjoint(r.key for r in finding.good)):
        return False
    write_atomic(root / finding.series / f"{finding.name}.index.jsonl", finding.index_file())
    proof = "" if finding.proven else "; nothing vouches for its bytes any more: check it with --decode 100%"
    result.done.append(f"the index of {finding.name} was rebuilt from its data file{proof}")
    return True


def _set_aside(folder: Path, finding: ShardFinding) -> None:
    """Take a shard out of the cache: first a list of its good entries, then its index goes, then its name."""
    data = folder / finding.file
    write_atomic(folder / f"{finding.name}.index.damaged", finding.index_file())
    remove(folder / f"{finding.name}.index.jsonl")
    if data.exists():
        rename(data, data.with_name(data.name + DAMAGED))


def _take_good(root: Path, writer: CacheWriter, series: str, result: Repaired) -> None:
    """Move the good entries of all shards set aside, now or by a repair that was stopped, into new ones."""
    folder, backend = root / series, backend_of(writer.identity.backend)
    _free_names(root, folder, backend)
    for listed in sorted(folder.glob("*.index.damaged")):
        name = listed.name.removesuffix(".index.damaged")
        data = folder / (backend.data_file(name) + DAMAGED)
        records = {record.key: record for record in _listed(listed)}
        if records and data.exists():
            _copy(writer, parse_shard(name, series), data, records)
        if writer.busy():
            raise CacheError(f"another process is filling {root}.", "Wait for it to end, then repair.")
        kept = len(records.keys() & writer.committed(series))
        with cache_lock(root):
            remove(data)
            remove(listed)  # last: without it, nothing knows what the data file is
        result.done.append(f"{name} was damaged: {kept} good entries were kept, the others dropped")
        result.missing = True


def _free_names(root: Path, folder: Path, backend: Backend) -> None:
    """Go on with renames that were stopped, before any new shard takes a number."""
    for listed in sorted(folder.glob("*.index.damaged")):
        name = listed.name.removesuffix(".index.damaged")
        whole = folder / backend.data_file(name)
        data = whole.with_name(whole.name + DAMAGED)
        if whole.exists() and not data.exists() and not (folder / f"{name}.index.jsonl").exists():
            with cache_lock(root):  # with an index, it is the new shard, which took the number
                rename(whole, data)


def _listed(path: Path) -> list[EntryRecord]:
    try:
        return records_of(parse_index(read_regular(path)))
    except ValueError:
        return []


def _copy(writer: CacheWriter, name: ShardName, data: Path, records: Mapping[str, EntryRecord]) -> None:
    """Entries copied, byte for byte, into shards that the next repair finishes if this one is stopped."""
    series, backend = name.series, backend_of(writer.identity.backend)
    writer.plan(series, list(records), len(records), name.group_text)
    with open_regular(data) as stream:
        size = data.stat().st_size
        for job in writer.jobs(series, records):
            with job:
                for key in job.remaining:
                    contents = read_contents(stream, records[key], size, backend)
                    if contents is None:
                        job.fail(key, data.name, "damaged")
                    else:
                        job.copy(key, contents)
                job.finish()


def _mend_journal(root: Path, result: Repaired) -> None:
    """Leave out lines that are changed; under the cache lock, with no shard being filled."""
    with cache_lock(root):
        journal = Journal(root / JOURNAL_FILE)
        lines: list[dict[str, Any]] = list(journal.read())
        write_atomic(journal.path, b"".join(seal_line(line) for line in lines))
    result.done.append(f"{journal.garbled} wrong lines of the journal were left out")
