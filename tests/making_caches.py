"""Small caches of random entries, made without any encoder."""

from __future__ import annotations

from pathlib import Path

import torch

from cogcache.cache.fill import fill_series
from cogcache.cache.format import (
    Entry,
    Identity,
    ModelRecord,
    SampleRecord,
    ValidationRecord,
    digest,
    entry_key,
    sort_buckets,
)
from cogcache.cache.moments import MOMENTS_8BIT, pack_moments
from cogcache.cache.writer import CacheWriter
from cogcache.geometry import Bucket, Size
from cogcache.variants import read_variant

Clip = tuple[int, Size]
SMALL: Clip = (9, Size(32, 48))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_cache(
    root: Path,
    model: Path,
    clips: list[Clip],
    *,
    dtype: str = "float32",
    seed: int = 0,
    bad: int | None = None,
    prompts: int = 0,
    packed: bool = False,
) -> Path:
    """A cache with one random entry for each of ``clips`` (frames, size); number ``bad`` holds a NaN.

    With ``prompts`` it also has that many for validation, with images of the first clip's size; ``packed`` keeps
    log-variances in 8 bits.
    """
    variant = read_variant(model)
    source = torch.Generator().manual_seed(seed)
    series = ["latents", "text"] + (["images"] if variant.task == "i2v" else [])
    prints = {name: {"made_by": "test", "seed": seed, "series": name} for name in series}
    if packed:
        prints["latents"] |= {"log_variance": "8bit", "vae_dtype": dtype}
    buckets = sort_buckets(str(Bucket.of(*clip)) for clip in clips)
    identity = Identity(model=ModelRecord(id=str(model), variant=variant), series=prints, buckets=buckets)
    entries: dict[tuple[str, str], list[Entry]] = {}

    def add(name: str, group: object, number: object, tensors: dict[str, torch.Tensor]) -> str:
        key = entry_key(prints[name], number=number)
        cast = {field: value.to(DTYPES[dtype]) for field, value in tensors.items()}
        if packed and name == "latents":
            cast = {MOMENTS_8BIT: pack_moments(cast["moments"])}
        entries.setdefault((name, str(group)), []).append(Entry(key, cast, {"number": str(number)}))
        return key

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source)

    def text(number: object) -> str:
        return add(
            "text",
            variant.text_length,
            number,
            {"prompt_embeds": normal(variant.text_length, variant.text_dim)},
        )

    samples = []
    for number, (frames, size) in enumerate(clips):
        c, f, h, w = variant.latent_shape(frames, size)
        moments = torch.cat([normal(c, f, h, w), normal(c, f, h, w) * 0.5 - 2])
        if number == bad:
            moments[0, 0, 0, 0] = torch.nan
        images = ()
        if variant.task == "i2v":
            images = tuple(
                add("images", size, (number, k), {"latents": normal(c, 1, h, w)}) for k in range(3)
            )
        samples.append(
            SampleRecord(
                id=f"clip-{number:03d}",
                source=f"clip-{number:03d}.mp4",
                sha256=digest([seed, number]),
                window="start",
                caption=f"clip {number}",
                frames=frames,
                height=size.height,
                width=size.width,
                fps=8.0,
                latents=add("latents", Bucket.of(frames, size), number, {"moments": moments}),
                text=text(number),
                images=images,
            )
        )
    empty = text("empty")
    validation = []
    for number in range(prompts):
        c, _, h, w = variant.latent_shape(*clips[0])
        wants_image = variant.task == "i2v"
        image = (
            add("images", clips[0][1], ("clean", number), {"latents": normal(c, 1, h, w)})
            if wants_image
            else None
        )
        name = f"{number}.png" if wants_image else None
        validation.append(
            ValidationRecord(
                prompt=f"prompt {number}", text=text(f"prompt {number}"), image=image, image_name=name
            )
        )
    writer = CacheWriter.open(root, identity)
    for (name, group), items in entries.items():
        fill_series(writer, name, items, 100, group)
    writer.commit(samples, [], empty, validation)
    return root
