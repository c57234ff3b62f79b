"""``cogcache encode --dry-run``: what a run would do and why. Loads no model and changes nothing in the cache."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cogcache.cache.folder import SeriesFolder
from cogcache.cache.format import (
    FAILURES_FILE,
    IDENTITY_FILE,
    IMAGES,
    JOURNAL_FILE,
    LATENTS,
    SAMPLES_FILE,
    TEXT,
    FailureRecord,
    SampleRecord,
)
from cogcache.cache.identity import check_buckets, check_same, read_identity
from cogcache.cache.journal import Journal
from cogcache.cache.needs import needs_of
from cogcache.cache.storage import LocalStorage
from cogcache.cache.tables import read_manifest, read_table
from cogcache.config import EncodeConfig
from cogcache.errors import CacheError
from cogcache.precompute.clips import ClipWork, plan_clips, text_key
from cogcache.precompute.datasets import find_clips
from cogcache.precompute.settings import EncodeSettings, decide
from cogcache.precompute.validation import plan_validation
from cogcache.wording import counted, where_they_differ

__all__ = ["Change", "RunPlan", "plan_run", "tell_plan"]

_UNITS = {LATENTS: "latent", TEXT: "caption", IMAGES: "image condition"}


@dataclass(frozen=True)
class Change:
    """One clip that the run would touch. ``makes`` counts the entries of each series that it still needs."""

    source: str
    window: str
    why: str
    makes: dict[str, int] = field(default_factory=dict)


@dataclass
class RunPlan:
    """What a run would do. ``entries`` counts what it would encode, each entry once however many clips share it."""

    changes: list[Change]
    removed: list[str]
    unchanged: int
    entries: dict[str, int]


@dataclass
class _Before:
    """The cache as it is. Tables are empty where there is no finished cache."""

    samples: dict[str, SampleRecord] = field(default_factory=dict)
    failures: dict[str, FailureRecord] = field(default_factory=dict)
    durable: dict[str, set[str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def plan_run(config: EncodeConfig) -> RunPlan:
    """Compare the lists and settings with the cache.

    Raises:
        MismatchError: if settings or model have changed, which a run would refuse: every field as "was / is".
        CogcacheError: as a run would, for bad lists, settings or a damaged cache.
    """
    items = find_clips(config.data_root, config.dataset, config.allow_outside)
    settings = decide(config, items)
    clips = plan_clips(items, settings)
    prompts = plan_validation(settings)
    before = _before(settings)
    changes = [change for clip in clips if (change := _change(clip, before))]
    kept = {clip.id for clip in clips}
    old: list[SampleRecord | FailureRecord] = [
        *before.samples.values(),
        *(f for f in before.failures.values() if f.window != "validation"),
    ]
    removed = [f"{row.source} ({row.window})" for row in old if row.id not in kept]
    wanted = {
        LATENTS: {clip.latents for clip in clips},
        TEXT: {text_key(settings, ""), *prompts.captions, *(clip.text for clip in clips)},
        IMAGES: {*prompts.images, *(key for clip in clips for key in clip.images)},
    }
    entries = {name: len(keys - before.durable.get(name, set())) for name, keys in wanted.items()}
    return RunPlan(changes, removed, len(clips) - len(changes), entries)


def _before(settings: EncodeSettings) -> _Before:
    root, before = settings.shards, _Before()
    if not (root / IDENTITY_FILE).exists():
        return before
    identity, wanted = read_identity(root), settings.identity()
    again = {IMAGES} if settings.config.remake_images else set()
    check_same(root, identity, wanted, wanted.series.keys() - again)
    check_buckets(root, identity, wanted)
    for name in wanted.series.keys() - again:
        if name in identity.series and (root / name).is_dir():  # a folder that is there is not written to
            folder = SeriesFolder(root, identity, name)
            before.durable[name] = folder.durable_keys()
    before.reasons = {key: reason for (_, key), reason in Journal(root / JOURNAL_FILE).reasons().items()}
    try:
        storage = LocalStorage(root)
        manifest = read_manifest(storage)
        rows = read_table(storage, manifest, SAMPLES_FILE, SampleRecord)
        lost = read_table(storage, manifest, FAILURES_FILE, FailureRecord)
    except CacheError:
        return before  # not finished, or written anew by the run
    before.samples, before.failures = {row.id: row for row in rows}, {row.id: row for row in lost}
    return before


def _change(clip: ClipWork, before: _Before) -> Change | None:
    missing = [(series, key) for series, key in needs_of(clip) if key not in before.durable.get(series, ())]
    reasons = _reasons(clip, before, missing)
    if not reasons:
        return None
    makes = dict(Counter(series for series, _ in missing))
    return Change(clip.item.source, clip.window, "; ".join(reasons), makes)


def _reasons(clip: ClipWork, before: _Before, missing: Sequence[tuple[str, str]]) -> list[str]:
    row = before.samples.get(clip.id)
    failed = next((before.reasons[key] for _, key in missing if key in before.reasons), "")
    if failed:
        return [f"failed before ({failed}), tried again"]
    if row is None and clip.id in before.failures:
        return [f"failed before ({before.failures[clip.id].reason}), tried again"]
    if row is None:
        return ["new"] if missing or before.samples else []
    reasons = []
    if row.sha256 != clip.sha256:
        reasons.append("changed file")
    if row.bucket != clip.bucket:
        reasons.append(f"moved from bucket {row.bucket} to {clip.bucket}")
    if row.text != clip.text:
        was, now = where_they_differ(row.caption, clip.item.caption)
        reasons.append(f"changed caption: was {was}, is {now}")
    if row.images != clip.images and row.latents == clip.latents:
        longer = clip.images[: len(row.images)] == row.images
        reasons.append(
            f"image conditions: was {len(row.images)}, is {len(clip.images)}"
            if longer or row.images[: len(clip.images)] == clip.images
            else "changed image"
        )
    return reasons or (["entries are missing"] if missing else [])


def tell_plan(plan: RunPlan, config: EncodeConfig) -> None:
    """Print a plan to standard output, a line for each clip, the totals last."""
    lines = [f"{c.source} ({c.window}): {c.why}{_needs(c)}" for c in plan.changes]
    lines += [f"{name}: removed from the lists; leaves the table, its entries stay" for name in plan.removed]
    kinds = Counter(change.why.split(":")[0].split(" (")[0] for change in plan.changes)
    total = [f"{count} {kind}" for kind, count in kinds.most_common()]
    total += [f"{len(plan.removed)} removed"] if plan.removed else []
    lines.append(f"Clips: {', '.join([*total, f'{plan.unchanged} unchanged'])}.")
    made = plan.entries
    lines.append(
        f"Would encode {', '.join(counted(made[series], one) for series, one in _UNITS.items())}. Nothing was changed."
    )
    if config.remake_images:
        lines.append("--remake-images would drop all image conditions first.")
    sys.stdout.write("\n".join(line.encode("utf-8", "backslashreplace").decode() for line in lines) + "\n")


def _needs(change: Change) -> str:
    made = [counted(count, _UNITS[series]) for series, count in change.makes.items()]
    return f" -> {', '.join(made)}" if made else " -> nothing to encode"
