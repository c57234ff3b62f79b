"""Small encode runs of several shapes, and what must hold of their cache after every kill."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import verify_kit
from cache_kit import data_file
from verify_kit import SIZE, caption, latent_facts, latent_key, text_key

from cogcache.cache import keys
from cogcache.cache.check import check_cache
from cogcache.cache.format import (
    IMAGES,
    LATENTS,
    MANIFEST_FILE,
    TEXT,
    BackendName,
    FailureRecord,
    Identity,
    SampleRecord,
    ValidationRecord,
)
from cogcache.cache.reader import CacheReader
from cogcache.cache.rounds import fill_in_rounds
from cogcache.cache.writer import CacheWriter

IMAGE_PRINT: dict[str, Any] = {"vae_dtype": "bfloat16", "noise": "test"}
_LINE = re.compile(rb'\{"key":"([0-9a-f]{32})".*')
_INDEX = re.compile(r"(.+)\.index\.(jsonl|part|damaged)")


def image_key(image: str, draw: int | None) -> str:
    return keys.image_key(IMAGE_PRINT, image, SIZE, draw)


@dataclass(frozen=True)
class Lists:
    """What a run of encode is given.

    Args:
        clips: Number of clips.
        per_shard: Entries of each series in a shard.
        bad: Clips that cannot be decoded.
        draws: Image conditions of each clip.
        prompts: Prompts for validation, each with an image where clips have image conditions.
        backend: How shards are stored.
    """

    clips: int
    per_shard: int = 2
    bad: frozenset[int] = frozenset()
    draws: int = 0
    prompts: int = 0
    backend: BackendName = "webdataset"

    @property
    def identity(self) -> Identity:
        series = {**verify_kit.IDENTITY.series, **({IMAGES: IMAGE_PRINT} if self.draws else {})}
        return verify_kit.IDENTITY.model_copy(update={"series": series, "backend": self.backend})

    @property
    def unreadable(self) -> frozenset[str]:
        return frozenset(latent_key(clip) for clip in self.bad)

    def facts(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Series -> key -> facts of all entries, the unreadable among them."""
        clips = range(self.clips)
        words = ["", *(caption(clip) for clip in clips), *(f"prompt {n}" for n in range(self.prompts))]
        images = [(f"first of {clip}", draw) for clip in clips for draw in range(self.draws)]
        images += [(f"image {n}", None) for n in range(self.prompts if self.draws else 0)]
        return {
            LATENTS: latent_facts(self.clips),
            TEXT: {text_key(text): {"caption": text} for text in words},
            IMAGES: {
                image_key(image, draw): {"image": image, "size": SIZE, "draw": draw} for image, draw in images
            },
        }

    def keys(self) -> set[str]:
        """Keys of all entries that can be made."""
        return {key for facts in self.facts().values() for key in facts} - self.unreadable

    def sample(self, clip: int) -> SampleRecord:
        images = tuple(image_key(f"first of {clip}", draw) for draw in range(self.draws))
        return verify_kit.sample(clip).model_copy(update={"images": images})

    def prompt(self, number: int) -> ValidationRecord:
        clean = image_key(f"image {number}", None) if self.draws else None
        name = f"{number}.png" if self.draws else None
        text = f"prompt {number}"
        return ValidationRecord(prompt=text, text=text_key(text), image=clean, image_name=name)


def encode(root: Path, done: Callable[[str], object], *, lists: Lists) -> bool:
    """A whole run; False if other processes are not finished yet."""
    writer = CacheWriter.open(root, lists.identity)
    facts = {series: lists.facts()[series] for series in lists.identity.series}

    def fill(chosen: Collection[str]) -> None:
        for series in chosen:
            verify_kit.make(writer, series, facts[series], done, unreadable=lists.unreadable)

    for series, wanted in facts.items():
        writer.plan(series, list(wanted), lists.per_shard, verify_kit.GROUPS[series])
    if not fill_in_rounds(writer, facts, fill):
        return False
    failures = [
        FailureRecord(id=f"bad-{clip}", source=f"{clip}.mp4", window="start", reason="cannot be decoded")
        for clip in lists.bad
    ]
    samples = [lists.sample(clip) for clip in range(lists.clips) if clip not in lists.bad]
    writer.commit(samples, failures, text_key(""), [lists.prompt(n) for n in range(lists.prompts)])
    return True


def encode_until_idle(root: Path, done: Callable[[str], object], *, lists: Lists) -> None:
    """Body of one of several processes that fill the same cache; takes over what a killed one leaves."""
    while not encode(root, done, lists=lists):
        pass


def encoding(lists: Lists) -> partial[bool]:
    """:func:`encode` of these lists, to be given to a process."""
    return partial(encode, lists=lists)


@dataclass
class Kept:
    """What indexes say is on disk, read without the code under test: the shards that hold each key.

    ``aside`` are keys that a repair has listed of the shards that it is about to replace.
    """

    shards: Mapping[str, set[str]]
    aside: frozenset[str]

    @property
    def keys(self) -> set[str]:
        return set(self.shards) | self.aside

    @classmethod
    def of(cls, root: Path) -> Kept:
        shards: dict[str, set[str]] = defaultdict(set)
        aside = set()
        for path in sorted(root.glob("*/*.index.*")):
            match = _INDEX.fullmatch(path.relative_to(root).as_posix())
            if match is None:
                continue
            for line in path.read_bytes().split(b"\n")[:-1]:
                if found := _LINE.fullmatch(line):
                    key = found[1].decode()
                    if match[2] == "damaged":
                        aside.add(key)
                    else:
                        shards[key].add(match[1])
        return cls(shards, frozenset(aside))


def check_after_kill(root: Path, before: Kept, told: frozenset[str], finished: bool) -> Kept:
    """Whatever was durable still is, no key is twice, and nothing is damaged; ``finished``: as it was before."""
    kept = Kept.of(root)
    assert before.keys | told <= kept.keys, "a durable entry is gone"
    assert all(len(shards) == 1 for shards in kept.shards.values()), "an entry is in two shards"
    if not (root / "cache.json").exists():
        assert not kept.keys
        return kept
    report = check_cache(root).report
    unfinished = "it is missing: encode has not finished, or it was lost"
    damages = [d for d in report.damages if finished or (d.file, d.what) != (MANIFEST_FILE, unfinished)]
    assert not damages, report.lines()
    assert not [fact for fact in report.facts if "does not belong" in fact], report.lines()
    if finished or (root / MANIFEST_FILE).exists():
        reader = CacheReader(root)
        assert not reader.damages()
    return kept


def moments(root: Path) -> set[str]:
    """Which of the short moments of the commit protocol the cache stopped in."""
    found = set()
    for plan in root.glob("*/*.plan.json"):
        name = plan.name.removesuffix(".plan.json")
        if plan.with_name(f"{name}.index.jsonl").exists():
            found.add("index there, plan not removed")
        elif data_file(root, name).exists():
            found.add("shard renamed, no index yet")
    if any(root.glob("*.next")):
        found.add("tables waiting" + (" beside the manifest" if (root / MANIFEST_FILE).exists() else ""))
    return found


@dataclass
class Tally:
    """Kills of each scenario, how far the runs had come (0 to 1), and the moments that were met."""

    kills: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    progress: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    moments: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, scenario: str, root: Path, progress: float, kills: int = 1) -> None:
        """Note a kill."""
        self.kills[scenario] += kills
        self.progress[scenario].append(progress)
        self.moments[scenario] |= moments(root)

    def check(self, scenario: str, least: int) -> None:
        """At least so many kills, at varied progress."""
        assert self.kills[scenario] >= least
        assert self.varied(scenario), sorted(self.progress[scenario])

    def varied(self, scenario: str) -> bool:
        """Whether there were kills in every third of the work, in at least four states."""
        progress = self.progress[scenario]
        return {min(2, int(3 * part)) for part in progress} == {0, 1, 2} and len(set(progress)) >= 4

    def lines(self) -> list[str]:
        """The table for people."""
        rows = [
            f"{name:56}{count:6} kills in {len(set(self.progress[name])):3} states{self.seconds.get(name, 0):8.1f} s"
            for name, count in self.kills.items()
        ]
        return [*rows, f"{'total':56}{sum(self.kills.values()):6} kills{sum(self.seconds.values()):22.1f} s"]
