"""Bytes per clip, and writing and reading speed, of tar shards, zarr shards and one safetensors file per entry.

    python benchmarks/cache_formats.py WORK [--clips 16] [--repeats 3]

Needs no model: values are drawn as the entries of both generations at their own sizes. WORK gets about 1 GB and is
left as it is; give an empty folder. All ways are measured in one run, by turns; each figure is the best of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from cogcache.bench.facts import machine_facts
from cogcache.bench.random_cache import CLIPS, real_variant
from cogcache.cache.files import write_file
from cogcache.cache.fill import fill_series
from cogcache.cache.format import (
    IMAGES,
    LATENTS,
    TEXT,
    BackendName,
    Entry,
    Identity,
    ModelRecord,
    ZarrCompression,
    digest,
)
from cogcache.cache.reader import CacheReader
from cogcache.cache.writer import CacheWriter
from cogcache.tiny import Family
from cogcache.variants import Variant

NAMES = {LATENTS: "moments", TEXT: "prompt_embeds", IMAGES: "latents"}
WAYS: dict[str, tuple[BackendName, ZarrCompression]] = {
    "webdataset": ("webdataset", "none"),
    "zarr, zstd": ("zarr", "zstd"),
    "zarr, none": ("zarr", "none"),
}
FILES = "one file each"


def entries(family: Family, variant: Variant, clips: int) -> dict[str, list[Entry]]:
    """Entries by series: one clip, one caption and one image condition for each.

    Means of the posterior are normal with the spread that the scaling factor tells, log-variances narrow and far below
    zero, embeddings normal. Neighbours are not alike, as those of real footage are.
    """
    frames, size, tokens = CLIPS[family]
    channels, depth, height, width = variant.latent_shape(frames, size)
    spread = 1 / variant.scaling_factor
    found: dict[str, list[Entry]] = {LATENTS: [], TEXT: [], IMAGES: []}
    for clip in range(clips):
        noise = torch.Generator().manual_seed(clip)
        mean = torch.randn(channels, depth, height, width, generator=noise) * spread
        logvar = torch.randn(channels, depth, height, width, generator=noise) * 0.7 - 8
        text = torch.randn(tokens, variant.text_dim, generator=noise) * 0.2
        image = torch.randn(channels, 1, height, width, generator=noise) * spread
        for series, values in ((LATENTS, torch.cat([mean, logvar])), (TEXT, text), (IMAGES, image)):
            key = digest([family, series, clip])[:32]
            facts = {
                "source": f"clips/{clip:05d}.mp4",
                "window": "start",
                "times": [n / 8 for n in range(frames)],
            }
            found[series].append(Entry(key, {NAMES[series]: values.bfloat16()}, facts))
    return found


def write_shards(root: Path, variant: Variant, found: dict[str, list[Entry]], way: str) -> float:
    """Seconds to a committed cache, every entry durable by itself."""
    backend, compression = WAYS[way]
    model = ModelRecord(id="random", variant=variant)
    identity = Identity(backend=backend, model=model, series={name: {"schema": 1} for name in found})
    started = time.perf_counter()
    writer = CacheWriter.open(root, identity, compression)
    for series, items in found.items():
        fill_series(writer, series, items, max(1, round(256e6 / _bytes(items[0]))), "1")
    writer.commit([], [], found[TEXT][0].key)
    return time.perf_counter() - started


def write_files(root: Path, found: dict[str, list[Entry]]) -> float:
    """As many files as entries, each durable, without facts and checksums: what other trainers keep."""
    started = time.perf_counter()
    root.mkdir(parents=True)
    for entry in (entry for items in found.values() for entry in items):
        write_file(root / f"{entry.key}.safetensors", save(dict(entry.tensors)))
    return time.perf_counter() - started


def read_way(way: str, root: Path) -> Callable[[str, str], object]:
    """How one entry is read."""
    if way == FILES:
        return lambda _, key: [value.clone() for value in load_file(root / f"{key}.safetensors").values()]
    reader = CacheReader(root)
    return reader.read


def measure(family: Family, work: Path, clips: int, repeats: int) -> list[dict[str, object]]:
    """All ways for one family, a row each."""
    variant = real_variant(family)
    found = entries(family, variant, clips)
    raw = {series: sum(map(_bytes, items)) for series, items in found.items()}
    ways, keys = [FILES, *WAYS], [(series, entry.key) for series in found for entry in found[series]]
    written, read = dict.fromkeys(ways, 1e9), {way: dict.fromkeys(found, 1e9) for way in ways}
    for turn in range(repeats):
        for way in ways:
            root = work / family / way
            shutil.rmtree(root, ignore_errors=True)
            os.sync()
            took = write_files(root, found) if way == FILES else write_shards(root, variant, found, way)
            written[way] = min(written[way], took)
        order = random.Random(turn).sample(keys, len(keys))
        for way in ways:
            one = read_way(way, work / family / way)
            for series in found:
                wanted = [key for name, key in order if name == series]
                started = time.perf_counter()
                for key in wanted:
                    one(series, key)
                read[way][series] = min(read[way][series], time.perf_counter() - started)
    return [
        {
            "family": family,
            "way": way,
            "clip_bytes": round(_on_disk(work / family / way) / clips),
            "files": sum(path.is_file() for path in (work / family / way).rglob("*")),
            "write_mb_s": sum(raw.values()) / written[way] / 1e6,
            **{f"read_{series}_mb_s": raw[series] / read[way][series] / 1e6 for series in found},
        }
        for way in ways
    ]


def levels(family: Family, repeats: int) -> list[dict[str, object]]:
    """What higher levels of zstd, other shuffles and lz4 would do to one clip's moments and to one embedding."""
    from numcodecs import blosc

    blosc.use_threads = False
    found, rows = entries(family, real_variant(family), 1), []
    for series in (LATENTS, TEXT):
        (tensor,) = found[series][0].tensors.values()
        values = tensor.view(torch.int16).numpy().view("u2")
        for codec, level, shuffle in [(b"zstd", n, 1) for n in (1, 3, 5)] + [(b"zstd", 3, 2), (b"lz4", 5, 1)]:
            best, back = 1e9, 1e9
            for _ in range(repeats):
                started = time.perf_counter()
                packed = blosc.compress(values, codec, level, shuffle)
                middle = time.perf_counter()
                blosc.decompress(packed, values.copy())
                best, back = min(best, middle - started), min(back, time.perf_counter() - middle)
            mega = values.nbytes / 1e6
            name = f"{codec.decode()} {level}, {'byte' if shuffle == 1 else 'bit'} shuffle"
            rows.append(
                {
                    "series": series,
                    "codec": name,
                    "size": len(packed) / values.nbytes,
                    "compress_mb_s": mega / best,
                    "decompress_mb_s": mega / back,
                }
            )
    return rows


def _bytes(entry: Entry) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.tensors.values())


def _on_disk(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def table(rows: Sequence[dict[str, object]]) -> str:
    """As Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("work", type=Path)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    families: list[Family] = ["5b", "1.5-5b"]
    rows = [row for family in families for row in measure(family, args.work, args.clips, args.repeats)]
    print(json.dumps(machine_facts()))
    print(table(rows), table(levels("5b", args.repeats)), sep="\n\n")


if __name__ == "__main__":
    main()
