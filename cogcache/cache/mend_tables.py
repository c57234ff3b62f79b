"""Part of a repair: tables and manifest that agree with the entries that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cogcache.cache.check import Checked, check_cache
from cogcache.cache.damage import Repaired
from cogcache.cache.files import remove
from cogcache.cache.format import (
    FAILURES_FILE,
    JOURNAL_FILE,
    MANIFEST_FILE,
    SAMPLES_FILE,
    TEXT,
    VALIDATION_FILE,
    FailureRecord,
    Identity,
    SampleRecord,
)
from cogcache.cache.journal import Journal
from cogcache.cache.keys import text_key
from cogcache.cache.lock import cache_lock
from cogcache.cache.needs import needs_of, needs_of_prompt
from cogcache.cache.writer import CacheWriter

__all__ = ["mend_tables"]

_DROPPED = "its entry was damaged and has been dropped; encode makes it anew"


def mend_tables(
    checked: Checked, identity: Identity, advance: Callable[[int], object], result: Repaired
) -> None:
    """Write tables and manifest anew where they do not agree with what is there."""
    now = check_cache(checked.seen.root, advance) if result.done else checked
    top = (MANIFEST_FILE, SAMPLES_FILE, FAILURES_FILE, VALIDATION_FILE)
    if not any(damage.file in top for damage in now.report.damages):
        return
    root, rows = checked.seen.root, checked.seen.samples
    keys = now.good_keys()
    unconditional = text_key(identity.series.get(TEXT, {}), "")
    if checked.seen.manifest is not None:
        unconditional = checked.seen.manifest.unconditional
    if rows is None or unconditional not in keys[TEXT]:
        why = "samples.jsonl cannot be believed" if rows is None else "the empty caption's entry is lost"
        with cache_lock(root):
            remove(root / MANIFEST_FILE)
        result.done.append(
            f"no manifest can be written: {why}; encode writes it from your lists and encodes only what is missing"
        )
        result.missing = True
        return
    _commit(checked, identity, rows, keys, unconditional, result)


def _commit(
    checked: Checked,
    identity: Identity,
    rows: Sequence[SampleRecord],
    keys: dict[str, set[str]],
    unconditional: str,
    result: Repaired,
) -> None:
    root, seen = checked.seen.root, checked.seen
    complete = [row for row in rows if all(key in keys[series] for series, key in needs_of(row))]
    kept = {row.id for row in complete}
    dropped = [
        FailureRecord(id=row.id, source=row.source, window=row.window, reason=_DROPPED)
        for row in rows
        if row.id not in kept
    ]
    prompts = [
        prompt
        for prompt in seen.validation or ()
        if all(key in keys[series] for series, key in needs_of_prompt(prompt))
    ]
    journaled = {event.get("checksum") for event in Journal(root / JOURNAL_FILE).read()}
    writer = CacheWriter.open(root, identity)
    manifest = writer.commit(complete, [*(seen.failures or ()), *dropped], unconditional, prompts)
    if manifest.checksum in journaled:
        result.done.append("the manifest was rebuilt; the journal proves it is the one that was committed")
    else:
        result.done.append(
            f"tables and manifest were written anew, with {len(complete)} of {len(rows)} samples"
        )
    lost = len(seen.validation or ()) - len(prompts)
    if seen.validation is None or lost:
        result.done.append("validation prompts were lost; give --validation-prompts to encode again")
    result.missing |= bool(dropped) or seen.validation is None or bool(lost)
