"""What is no damage, yet worth knowing: files that belong to nothing, work that was stopped, spare entries."""

from __future__ import annotations

import re
from pathlib import Path

from cogcache.cache.backend import DAMAGED, PART, data_files
from cogcache.cache.damage import Report
from cogcache.cache.format import (
    FAILURES_FILE,
    IDENTITY_FILE,
    JOURNAL_FILE,
    MANIFEST_FILE,
    SAMPLES_FILE,
    TEXT,
    VALIDATION_FILE,
)
from cogcache.cache.lock import LOCK_FILE
from cogcache.cache.needs import needs_of, needs_of_prompt
from cogcache.cache.shard_check import ShardFinding
from cogcache.cache.survey import Survey
from cogcache.wording import counted

__all__ = ["tell_strangers"]

_TOP = {IDENTITY_FILE, MANIFEST_FILE, SAMPLES_FILE, FAILURES_FILE, VALIDATION_FILE, JOURNAL_FILE, LOCK_FILE}
_SETTINGS = "encode.config.yaml"
_SHARD_FILE = re.compile(
    r"\.?([a-z0-9_]+(?:-[0-9x]+){1,2})\.(index\.jsonl|plan\.json|lock|index\.part|index\.damaged)"
)
_SET_ASIDE = "was set aside by a repair that was stopped; repair again"
_UNFINISHED = ("plan.json", "lock", "index.part")


def tell_strangers(seen: Survey, findings: list[ShardFinding], report: Report) -> None:
    """Add to the report's facts: files that belong to nothing, unfinished shards, and entries that no sample uses."""
    unfinished, ours = _data_strangers(seen, findings, report)
    for path in sorted(seen.root.rglob("*")):
        name = path.relative_to(seen.root).as_posix()
        if path.is_dir() or path in ours or name in {*_TOP, *seen.side_files, _SETTINGS}:
            continue
        match = _SHARD_FILE.fullmatch(path.name)
        if match and path.parent.parent == seen.root and match[1].split("-")[0] == path.parent.name:
            if match[2] in _UNFINISHED:
                unfinished.add(match[1])
            elif match[2].endswith("damaged"):
                report.facts.append(f"{name} {_SET_ASIDE}")
        elif name.endswith((".tmp", ".next")) or ".dropped/" in name:
            report.facts.append(f"{name} was left by a run that was stopped; the next encode clears it away")
        else:
            report.facts.append(f"{name} does not belong to the cache")
    report.facts += [f"shard {name} is not finished; encode goes on with it" for name in sorted(unfinished)]
    _unused(seen, findings, report)


def _data_strangers(seen: Survey, findings: list[ShardFinding], report: Report) -> tuple[set[str], set[Path]]:
    """Unfinished shards that have a data file, and all data files; says which of them belong to nothing."""
    unfinished, ours, known = set[str](), set[Path](), {finding.name for finding in findings}
    for folder in sorted(seen.root / series for series in seen.shards if (seen.root / series).is_dir()):
        for shard, tail, path in sorted(data_files(seen.backend, folder)):
            ours.add(path)
            name = path.relative_to(seen.root).as_posix()
            if tail == PART:
                unfinished.add(shard)
            elif tail == DAMAGED:
                report.facts.append(f"{name} {_SET_ASIDE}")
            elif shard not in known and not (folder / f"{shard}.plan.json").exists():
                report.facts.append(f"{name} has no index, so it is no part of the cache; it can be deleted")
    return unfinished, ours


def _unused(seen: Survey, findings: list[ShardFinding], report: Report) -> None:
    if seen.manifest is None or seen.samples is None:
        return
    named = {name for record in seen.manifest.series.values() for name in (s.name for s in record.shards)}
    new = [finding.name for finding in findings if finding.name not in named]
    report.facts += [f"shard {name} is committed, but not yet in {MANIFEST_FILE}" for name in new]
    used = {need for row in seen.samples for need in needs_of(row)} | {(TEXT, seen.manifest.unconditional)}
    used |= {need for prompt in seen.validation or () for need in needs_of_prompt(prompt)}
    spare = sum((f.series, r.key) not in used for f in findings for r in f.good)
    if spare:
        report.facts.append(f"used by no sample: {counted(spare, 'entry', 'entries')}, which may stay")
