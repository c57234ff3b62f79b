"""What is planned for: a model by its config files alone, and clips by their shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogcache.bench.real import real_config
from cogcache.cache.reader import CacheReader
from cogcache.errors import ConfigError, ModelError
from cogcache.geometry import Bucket, parse_bucket, parse_size
from cogcache.models import resolve_model
from cogcache.tiny.families import Family, facts_of
from cogcache.variants import Variant, expected_dtype, read_config, read_variant, variant_of

__all__ = ["Clips", "Model", "clips_of", "family_model", "find_model"]

_PUBLISHED_VAE = [128, 256, 256, 512]
"""``block_out_channels`` of all five published families."""


@dataclass(frozen=True)
class Model:
    """A base model.

    Attributes:
        name: As it was given.
        transformer: ``transformer/config.json``.
        dtype: What its weights are in.
        usual_vae: Whether the VAE is as large as the published one, of which encode times are known.
    """

    name: str
    transformer: Mapping[str, Any]
    variant: Variant
    dtype: str
    usual_vae: bool


@dataclass(frozen=True)
class Clips:
    """Clips by bucket. ``known`` tells whether they are there; if not, one stands for each bucket.

    ``stored`` is the bytes of each series on disk, where a cache is there.
    """

    buckets: Mapping[Bucket, int]
    known: bool = False
    stored: Mapping[str, int] | None = None


def find_model(model: str | None, family: Family | None, shards: CacheReader | None) -> Model:
    """The model asked for, else the one that the cache was made for.

    Raises:
        ConfigError: if none is named, or two.
        ModelError: if its config files cannot be got.
    """
    if model and family:
        raise ConfigError("--model and --family both name a model.", "Give one of them.")
    if family:
        return family_model(family)
    if not model and shards is None:
        raise ConfigError(
            "which model? --model, --family or --shards is needed.",
            "Try --family 5b: nothing is downloaded for that.",
        )
    name = model or (shards.manifest.model.id if shards is not None else "")
    try:
        root = resolve_model(name, ())
    except ModelError as error:
        raise ModelError(error.message, "Or give --family 2b, 5b, 5b-i2v, 1.5-5b or 1.5-5b-i2v.") from None
    return _local_model(name, root)


def _local_model(name: str, root: Path) -> Model:
    variant = read_variant(root)
    return Model(
        name,
        read_config(root, "transformer/config.json"),
        variant,
        expected_dtype(root / "transformer", variant),
        read_config(root, "vae/config.json").get("block_out_channels") == _PUBLISHED_VAE,
    )


def family_model(family: Family) -> Model:
    """A published family, from what is known of its config files."""
    facts = facts_of(family)
    config = real_config(family, facts.transformer())
    variant = variant_of(config, facts.vae(), facts.scheduler())
    return Model(f"CogVideoX {family}", config, variant, variant.native_dtype, True)


def clips_of(
    variant: Variant,
    shards: CacheReader | None,
    buckets: list[str],
    frames: int | None,
    size: str | None,
    count: int | None,
) -> Clips:
    """The clips of a cache, or of the shapes given; by default the model's own.

    Args:
        count: How many there will be; spread evenly over the buckets.

    Raises:
        ConfigError: if shapes are given in two ways.
        GeometryError: if the model cannot take one.
    """
    given = [
        flag
        for flag, value in (("--shards", shards), ("--bucket", buckets), ("--frames/--size", frames or size))
        if value
    ]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} both tell the shapes of clips.", "Give one of them.")
    if shards is not None:
        return _cached(shards)
    shapes = [parse_bucket(text) for text in buckets] or [
        Bucket.of(frames or variant.sample_frames, parse_size(size) if size else variant.default_size)
    ]
    for shape in shapes:
        variant.check_clip(shape.frames, shape.size)
    shapes = sorted(set(shapes))
    whole, rest = divmod(count or len(shapes), len(shapes))
    return Clips(
        {shape: whole + (place < rest) for place, shape in enumerate(shapes) if whole + (place < rest)},
        count is not None,
    )


def _cached(shards: CacheReader) -> Clips:
    clips = Counter(record.bucket for record in shards.samples)
    if not clips:
        raise ConfigError("these shards hold no clips.", "Give --frames and --size, or --bucket, instead.")
    series = shards.manifest.series
    stored = {name: sum(shard.bytes for shard in one.shards) for name, one in series.items()}
    return Clips(dict(clips), True, stored)
