"""``cogcache verify``: every byte of a cache against everything that vouches for it. Changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cogcache.cache.contents import Expectation
from cogcache.cache.damage import Damage, Report
from cogcache.cache.files import storage_errors
from cogcache.cache.format import (
    IMAGES,
    JOURNAL_FILE,
    LATENTS,
    MANIFEST_FILE,
    SAMPLES_FILE,
    TEXT,
    VALIDATION_FILE,
    Identity,
)
from cogcache.cache.index import ShardIndex, check_key, parse_index
from cogcache.cache.journal import Journal
from cogcache.cache.lines import load_sealed
from cogcache.cache.names import is_shard, parse_shard
from cogcache.cache.needs import needs_of, needs_of_prompt
from cogcache.cache.regular import read_regular
from cogcache.cache.shard_check import ShardFinding, examine
from cogcache.cache.strangers import tell_strangers
from cogcache.cache.survey import Survey, survey

__all__ = ["Checked", "check_cache"]


@dataclass
class Checked:
    """A report with what it rests on."""

    report: Report
    seen: Survey
    findings: list[ShardFinding]

    def good_keys(self) -> dict[str, set[str]]:
        """Series -> keys of entries that are there and sound."""
        keys: dict[str, set[str]] = defaultdict(set)
        for finding in self.findings:
            keys[finding.series].update(record.key for record in finding.good)
        return keys


def check_cache(root: Path, advance: Callable[[int], object] = lambda _: None) -> Checked:
    """Look at every file of a cache.

    Args:
        root: Folder of the cache.
        advance: Told how many bytes of shards more were read.

    Raises:
        CacheError: if there is no cache in ``root``, or it is of a later version.
        StorageError: if the disk or its permissions forbid reading.
    """
    root = root.absolute()
    with storage_errors(root, "read"):
        seen = survey(root)
        report = Report(str(root), list(seen.damages))
        findings = list(_shards(seen, advance)) if seen.identity else []
        report.damages += [damage for finding in findings for damage in finding.damages]
        _side_files(seen, findings, report)
        _references(seen, findings, report)
        _plans(root, report)
        _journal(root, report)
        tell_strangers(seen, findings, report)
    users = _users(seen)
    report.damages = [_with_clips(damage, users, findings) for damage in report.damages]
    report.counts = {
        "bytes": sum(finding.size for finding in findings),
        "shards": len(findings),
        "entries": sum(len(finding.good) for finding in findings),
        "samples": len(seen.samples or ()),
        "failures": len(seen.failures or ()),
    }
    return Checked(report, seen, findings)


def _shards(seen: Survey, advance: Callable[[int], object]) -> list[ShardFinding]:
    assert seen.identity is not None
    findings = []
    for series, shards in seen.shards.items():
        expected = _expectation(seen, seen.identity, series)
        if expected is None:
            continue
        for name in shards.names:
            record = shards.named.get(name)
            findings.append(examine(seen.root / series, name, record, expected, seen.backend, advance))
    return findings


def _expectation(seen: Survey, identity: Identity, series: str) -> Expectation | None:
    named = seen.manifest.series.get(series) if seen.manifest else None
    fingerprint = named.fingerprint if named else identity.series.get(series)
    if fingerprint is None:
        return None
    variant = seen.manifest.model.variant if seen.manifest else identity.model.variant
    return Expectation(series, variant, fingerprint)


def _side_files(seen: Survey, findings: list[ShardFinding], report: Report) -> None:
    """What tells other programs of the cache; of a group that is being filled, it may be ahead of the shards."""
    if seen.identity is None:
        return
    shards: dict[str, dict[str, ShardIndex]] = defaultdict(dict)
    for finding in findings:
        if finding.index or finding.good:
            shards[finding.series][finding.name] = finding.index or parse_index(finding.index_file())
    filled, due = _filled(seen), seen.backend.side_files(seen.root, seen.identity, shards)
    seen.side_files |= due.keys()
    # The first shard of a group may have been stopped between its files for others and its index.
    seen.side_files |= {
        (folder / name).relative_to(seen.root).as_posix()
        for folder in filled
        for name in {Path(name).name for name in due}
    }
    for name, data in due.items():
        path = seen.root / name
        if path.parent in filled or (path.is_file() and read_regular(path) == data):
            continue
        if path.exists() or _is_due(name, seen):
            report.damages.append(Damage(name, "it is missing or changed"))


def _is_due(side_file: str, seen: Survey) -> bool:
    """Whether it must be there by now: a run writes ``cache.json`` first, and may be stopped in between."""
    if seen.manifest is None:
        return False
    series, _, rest = side_file.partition("/")
    return not rest or series in seen.manifest.series


def _filled(seen: Survey) -> set[Path]:
    """Folders with data files of unfinished shards."""
    return {
        (folder / seen.backend.data_file(shard)).parent
        for series in seen.shards
        for folder in [seen.root / series]
        for plan in folder.glob("*.plan.json")
        for shard in [plan.name.removesuffix(".plan.json")]
        if is_shard(shard, series)
    }


def _references(seen: Survey, findings: list[ShardFinding], report: Report) -> None:
    """Every key that is named exists, in one shard. Entries already known to be damaged are not told twice."""
    there: dict[tuple[str, str], str] = {}
    for finding in findings:
        for record in finding.good:
            other = there.setdefault((finding.series, record.key), finding.name)
            if other != finding.name:
                what = f"an entry that is in {other} too"
                report.damages.append(
                    Damage(f"{finding.series}/{finding.file}", what, finding.name, record.key)
                )
    unread = {finding.series for finding in findings if finding.damages}
    for row in seen.samples or ():
        group = parse_shard(there.get((LATENTS, row.latents), f"{LATENTS}-00000")).group_text
        if group not in ("", str(row.bucket)):
            what = f"it says {row.bucket} of {row.source}, whose latent is in a shard of {group}"
            report.damages.append(Damage(SAMPLES_FILE, what, key=row.latents))
    needs = [(SAMPLES_FILE, *need) for row in seen.samples or () for need in needs_of(row)]
    needs += [(VALIDATION_FILE, *need) for row in seen.validation or () for need in needs_of_prompt(row)]
    if seen.manifest:
        needs.append((MANIFEST_FILE, TEXT, seen.manifest.unconditional))
    for file, series, key in dict.fromkeys(needs):
        if (series, key) not in there and series not in unread:
            report.damages.append(Damage(file, f"it names an entry that is not in {series}", key=key))


def _users(seen: Survey) -> Mapping[tuple[str, str], list[str]]:
    users: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in seen.samples or ():
        for need in needs_of(row):
            users[need].append(row.source)
    return users


def _with_clips(
    damage: Damage, users: Mapping[tuple[str, str], list[str]], findings: list[ShardFinding]
) -> Damage:
    """With the clips that need the entry; a damage that is not of one entry is of every clip of the shard."""
    if damage.key:
        series = [damage.file.split("/")[0]] if damage.shard else [LATENTS, TEXT, IMAGES]
        sources = [source for name in series for source in users.get((name, damage.key), ())]
    else:
        good = [f for f in findings if f.name == damage.shard]
        sources = [s for f in good for r in f.good for s in users.get((f.series, r.key), ())]
    return replace(damage, clips=tuple(dict.fromkeys(sources)))


def _plans(root: Path, report: Report) -> None:
    for path in sorted(root.glob("*/*.plan.json")):
        name = path.name.removesuffix(".plan.json")
        try:
            value = load_sealed(read_regular(path))
            if value["shard"] != name or not isinstance(value["keys"], list):
                raise ValueError("it is the plan of another shard")
            for key in value["keys"]:
                check_key(key)
        except (ValueError, KeyError) as error:
            report.damages.append(Damage(f"{path.parent.name}/{path.name}", str(error), name))


def _journal(root: Path, report: Report) -> None:
    journal = Journal(root / JOURNAL_FILE)
    for _ in journal.read():
        pass
    if journal.garbled:
        what = f"{journal.garbled} of its lines are changed; they are left out"
        report.damages.append(Damage(JOURNAL_FILE, what))
    if journal.torn:
        report.facts.append(f"the last line of {JOURNAL_FILE} was being written when a run was stopped")
