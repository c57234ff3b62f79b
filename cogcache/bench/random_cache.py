"""Caches of real-size entries without any encoder, for measuring reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cogcache.cache.fill import fill_series
from cogcache.cache.format import (
    LATENTS,
    TEXT,
    BackendName,
    Entry,
    Identity,
    ModelRecord,
    SampleRecord,
    digest,
    entry_key,
)
from cogcache.cache.writer import CacheWriter
from cogcache.geometry import Bucket, Size
from cogcache.progress import Progress
from cogcache.tiny import Family, build_tiny_model
from cogcache.variants import Variant, read_variant

__all__ = ["CLIPS", "random_cache", "real_variant"]

CLIPS: dict[Family, tuple[int, Size, int]] = {
    "5b": (49, Size(480, 720), 226),
    "1.5-5b": (81, Size(768, 1360), 224),
}
"""Frames, size and text length of the two generations' own clips (CogVideoX model cards)."""

_TEXT_DIM = 4096
_SHARD_BYTES = 256e6
_DISTINCT = 8


def real_variant(family: Family) -> Variant:
    """The family's facts with the text shape of the published model instead of the tiny one's."""
    with TemporaryDirectory() as folder:
        build_tiny_model(Path(folder) / "model", family)
        variant = read_variant(Path(folder) / "model")
    return variant.model_copy(update={"text_dim": _TEXT_DIM, "text_length": CLIPS[family][2]})


def random_cache(
    root: Path, family: Family, count: int, variant: Variant, backend: BackendName = "webdataset"
) -> Path:
    """A finished cache of ``count`` clips and captions with random bfloat16 values.

    The values are normal; a few tensors come again and again under new keys: reading does not look at them.
    """
    frames, size, _ = CLIPS[family]
    source = torch.Generator().manual_seed(0)
    c, f, h, w = variant.latent_shape(frames, size)
    moments = [torch.randn(2 * c, f, h, w, generator=source).bfloat16() for _ in range(_DISTINCT)]
    text_shape = (variant.text_length, variant.text_dim)
    texts = [torch.randn(text_shape, generator=source).bfloat16() for _ in range(_DISTINCT)]
    made_by = f"cogcache bench, {family}"
    prints = {name: {"made_by": made_by, "series": name} for name in (LATENTS, TEXT)}
    bucket = str(Bucket.of(frames, size))
    model = ModelRecord(id=f"random {family}", variant=variant)
    identity = Identity(backend=backend, model=model, series=prints, buckets=(bucket,))
    writer = CacheWriter.open(root, identity)
    keys = {name: [entry_key(prints[name], number=n) for n in range(count + 1)] for name in prints}
    _fill(writer, LATENTS, bucket, "moments", keys[LATENTS][:count], moments)
    _fill(writer, TEXT, str(variant.text_length), "prompt_embeds", keys[TEXT], texts)
    samples = [
        SampleRecord(
            id=f"clip-{number:06d}",
            source=f"clip-{number:06d}.mp4",
            sha256=digest(["random clip", number]),
            window="start",
            caption=f"clip {number}",
            frames=frames,
            height=size.height,
            width=size.width,
            fps=8.0,
            latents=keys[LATENTS][number],
            text=keys[TEXT][number],
        )
        for number in range(count)
    ]
    writer.commit(samples, [], keys[TEXT][count])
    return root


def _fill(
    writer: CacheWriter,
    series: str,
    group: str,
    tensor: str,
    keys: Sequence[str],
    values: Sequence[torch.Tensor],
) -> None:
    entries = [
        Entry(key, {tensor: values[place % len(values)]}, {"number": place}) for place, key in enumerate(keys)
    ]
    per_shard = max(1, int(_SHARD_BYTES // (2 * values[0].numel())))
    with Progress(f"Writing {series}", len(keys), "entries") as progress:
        fill_series(writer, series, entries, per_shard, group, progress.advance)
