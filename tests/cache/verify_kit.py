"""A small cache whose entries are what their series says, as encode writes it, without any model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import cache_kit
import torch
from cache_kit import VARIANT

from cogcache.cache import keys
from cogcache.cache.format import (
    IMAGES,
    LATENTS,
    TEXT,
    Entry,
    FailureRecord,
    Identity,
    ModelRecord,
    SampleRecord,
    ValidationRecord,
    digest,
)
from cogcache.cache.index import parse_index
from cogcache.cache.writer import CacheWriter

CLIPS = 6
LATENT_PRINT: dict[str, Any] = {"vae_dtype": "bfloat16", "fps": 8.0}
TEXT_PRINT: dict[str, Any] = {"text_dtype": "float32", "text_length": 8}
BUCKET = "9x32x48"
SIZE = "32x48"
GROUPS = {LATENTS: BUCKET, TEXT: "8", IMAGES: SIZE}
IDENTITY = Identity(
    model=ModelRecord(id="some/model", variant=VARIANT),
    series={LATENTS: LATENT_PRINT, TEXT: TEXT_PRINT},
    buckets=(BUCKET,),
)
"""As tar shards; :func:`identity` is for the backend under test."""
SHAPES = {LATENTS: (8, 3, 4, 6), TEXT: (8, 8), IMAGES: (4, 1, 4, 6)}
NAMES = {LATENTS: "moments", TEXT: "prompt_embeds", IMAGES: "latents"}
DTYPES = {LATENTS: torch.bfloat16, TEXT: torch.float32, IMAGES: torch.bfloat16}


def identity() -> Identity:
    return IDENTITY.model_copy(update={"backend": cache_kit.BACKEND})


def caption(clip: int) -> str:
    return f"caption {clip // 2}"


def latent_key(clip: int) -> str:
    return keys.latent_key(LATENT_PRINT, f"sha of {clip}", "start", BUCKET)


def text_key(words: str) -> str:
    return keys.text_key(TEXT_PRINT, words)


def latent_facts(clips: int) -> dict[str, dict[str, Any]]:
    """Key -> facts of the latents of so many clips."""
    return {
        latent_key(clip): {
            "source": f"{clip}.mp4",
            "sha256": f"sha of {clip}",
            "window": "start",
            "bucket": BUCKET,
        }
        for clip in range(clips)
    }


def facts_by_key() -> dict[str, dict[str, dict[str, Any]]]:
    """Series -> key -> facts of all entries of the cache, in the order of the plan."""
    captions = ["", *dict.fromkeys(caption(clip) for clip in range(CLIPS)), "a prompt"]
    return {
        LATENTS: latent_facts(CLIPS),
        TEXT: {text_key(words): {"caption": words} for words in captions},
    }


def make_entry(series: str, key: str, facts: dict[str, Any]) -> Entry:
    random = torch.Generator().manual_seed(int(key[:8], 16))
    tensor = torch.randn(SHAPES[series], generator=random).to(DTYPES[series])
    return Entry(key, {NAMES[series]: tensor}, facts)


def sample(clip: int) -> SampleRecord:
    source = f"{clip}.mp4"
    return SampleRecord(
        id=digest([source, "start", 0])[:16],
        source=source,
        sha256=f"sha of {clip}",
        window="start",
        caption=caption(clip),
        frames=9,
        height=32,
        width=48,
        fps=8.0,
        latents=latent_key(clip),
        text=text_key(caption(clip)),
    )


def fill(
    writer: CacheWriter,
    series: str,
    facts: Mapping[str, dict[str, Any]],
    per_shard: int,
    done: Callable[[str], object],
    *,
    unreadable: Collection[str] = (),
    damaged: Collection[str] = (),
) -> None:
    """Plan and make the entries of one series, as :func:`make` does."""
    writer.plan(series, list(facts), per_shard, GROUPS[series])
    make(writer, series, facts, done, unreadable=unreadable, damaged=damaged)


def make(
    writer: CacheWriter,
    series: str,
    facts: Mapping[str, dict[str, Any]],
    done: Callable[[str], object],
    *,
    unreadable: Collection[str] = (),
    damaged: Collection[str] = (),
) -> None:
    """Make the planned entries of one series; ``done`` is told each key after it is durable.

    Args:
        unreadable: Keys that fail.
        damaged: Keys to write with a wrong value.
    """
    for job in writer.jobs(series, facts):
        with job:
            for key in job.remaining:
                if key in unreadable:
                    job.fail(key, facts[key]["source"], "cannot be decoded")
                    continue
                entry = make_entry(series, key, facts[key])
                if key in damaged:
                    entry.tensors[NAMES[series]].view(-1)[3] = float("nan")
                job.append(entry)
                done(key)
            job.finish()


def encode(root: Path, damaged: Collection[str] = ()) -> list[str]:
    """A whole run of encode; gives the keys that it had to make. ``damaged``: keys to write with a wrong value."""
    made: list[str] = []
    writer = CacheWriter.open(root, identity())
    for series, per_shard in ((LATENTS, 2), (TEXT, 3)):
        fill(writer, series, facts_by_key()[series], per_shard, made.append, damaged=damaged)
    lost = FailureRecord(id="lost", source="lost.mp4", window="start", reason="cannot be decoded")
    if not (root / "manifest.json").exists():
        writer.journal.add(
            "failed", series=LATENTS, shard="latents-00009", key="0" * 32, source="lost.mp4", reason="x"
        )
    prompts = [ValidationRecord(prompt="a prompt", text=text_key("a prompt"))]
    writer.commit([sample(clip) for clip in range(CLIPS)], [lost], text_key(""), prompts)
    return made


def tensor_at(root: Path, series: str, key: str) -> tuple[Path, int]:
    """The data file that holds an entry, and where the bytes of its tensors begin."""
    for index in (root / series).glob("*.index.jsonl"):
        for found, members in parse_index(index.read_bytes()).entries.items():
            if found == key:
                return cache_kit.data_file(root, index.name.partition(".")[0]), members[0][1]
    raise KeyError(key)


def flip_tensor(root: Path, series: str, key: str) -> None:
    """Change one bit of the tensors of an entry."""
    path, start = tensor_at(root, series, key)
    flip(path, start + 120)


def flip(path: Path, byte: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)
