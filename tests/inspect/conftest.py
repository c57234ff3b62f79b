"""A cache of eight clips with everything that a report can hold, and a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser, programs
from inspect_kit import CAPTIONS, EVIL, OUTLIER

from cogcache.cache.fill import fill_series
from cogcache.cache.format import (
    Entry,
    FailureRecord,
    Identity,
    ModelRecord,
    SampleRecord,
    entry_key,
)
from cogcache.cache.writer import CacheWriter
from cogcache.tiny import Family
from cogcache.variants import read_variant


@pytest.fixture(scope="session")
def shards(tiny_models: Callable[[Family], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips in two sizes, number 6 with a latent unlike the others, and three failures. Read only."""
    root = tmp_path_factory.mktemp("inspect") / "shards"
    variant = read_variant(tiny_models("5b"))
    prints = {"latents": {"vae_dtype": "float32"}, "text": {"text_dtype": "float32"}}
    identity = Identity(model=ModelRecord(id="some/<b>model", variant=variant), series=prints)
    random = torch.Generator().manual_seed(0)
    entries: dict[str, dict[str, Entry]] = {"latents": {}, "text": {}}
    samples = []
    for number, caption in enumerate(CAPTIONS):
        height, width = (48, 32) if number == 2 else (32, 48)
        shape = (2 * variant.latent_channels, 3, height // 8, width // 8)
        moments = torch.randn(shape, generator=random)
        if number == OUTLIER:
            moments = moments * 9
        key, text = entry_key(prints["latents"], clip=number), entry_key(prints["text"], caption=caption)
        facts = {
            "reader": "pyav",
            "codec": "h264",
            "times_s": [0.0, 0.5 + number],
            "padded": int(number == 4),
        }
        entries["latents"][key] = Entry(key, {"moments": moments}, facts)
        embeds = torch.zeros(variant.text_length, variant.text_dim)
        entries["text"][text] = Entry(text, {"prompt_embeds": embeds}, {"caption": caption})
        samples.append(
            SampleRecord(
                id=f"{number:016x}", source=f"clips/{number}.mp4", sha256="0" * 64, window="start", caption=caption,
                frames=9, height=height, width=width, fps=8.0, latents=key, text=text,
            )
        )  # fmt: skip
    empty = entry_key(prints["text"], caption="")
    entries["text"][empty] = Entry(empty, {"prompt_embeds": embeds}, {"caption": ""})
    writer = CacheWriter.open(root, identity)
    for series, made in entries.items():
        fill_series(writer, series, list(made.values()), 3)
    reasons = ["too short", "too short", EVIL]
    failures = [
        FailureRecord(id=f"f{n}", source=f"bad/{n}.mp4", window="start", reason=r)
        for n, r in enumerate(reasons)
    ]
    writer.commit(samples, failures, empty)
    return root


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium. It cannot be had from a package index, so tests that need it skip where it is not
    installed; whatever can be told from the page's text is tested without it."""
    found = programs()
    if found is None:
        pytest.skip("chromium and chromedriver are not installed")
    browser = Browser(*found, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()
