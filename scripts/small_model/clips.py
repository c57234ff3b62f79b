"""The clips that the small model learns from: the made-up world, and footage if there is some."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from windows import FPS, windows

from cogcache.mp4 import read_mp4, write_mp4
from cogcache.small import Scene, all_scenes, render
from cogcache.small.architecture import FRAMES, HEIGHT, WIDTH


def write_clips(root: Path, scenes: Sequence[Scene], footage: Sequence[Path], workers: int) -> None:
    """Clips with ``metadata.jsonl``, as ``cogcache encode`` takes them.

    Args:
        footage: JSON lines files as :func:`windows.windows` reads them, or folders that this function wrote, whose
            clips are taken as they are.
    """
    (root / "videos").mkdir(parents=True, exist_ok=True)
    rows = [
        {"file_name": f"videos/{number:05}.mp4", "text": scene.caption} for number, scene in enumerate(scenes)
    ]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_write, [root / row["file_name"] for row in rows], scenes, chunksize=64))
    for clip, caption in (pair for source in footage for pair in _footage(source)):
        name = f"videos/footage-{len(rows) - len(scenes):04}.mp4"
        if isinstance(clip, Path):
            shutil.copyfile(clip, root / name)
        else:
            write_mp4(root / name, clip, FPS)
        rows.append({"file_name": name, "text": caption})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def choose_scenes(count: int, held_out: int, seed: int = 0) -> tuple[list[Scene], list[Scene]]:
    """Scenes to learn from, each as often as it must be, at another place every time; and others to measure by."""
    scenes = list(all_scenes())
    random.Random(seed).shuffle(scenes)
    kept, rest = scenes[:held_out], scenes[held_out:]
    return [replace(rest[n % len(rest)], seed=n) for n in range(count)], [
        replace(s, seed=count + n) for n, s in enumerate(kept)
    ]


def read_clips(paths: Sequence[Path], workers: int) -> np.ndarray:
    """Clips of one size, uint8 [N, F, H, W, 3]."""
    if not paths:
        return np.empty((0, FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    with ProcessPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(_read, paths, chunksize=32)))


def _write(path: Path, scene: Scene) -> None:
    write_mp4(path, render(scene, FRAMES, HEIGHT, WIDTH), FPS)


def _read(path: Path) -> np.ndarray:
    return read_mp4(path)[0]


def _footage(source: Path) -> Iterator[tuple[np.ndarray | Path, str]]:
    if source.is_dir():
        for row in map(json.loads, (source / "metadata.jsonl").read_text("utf-8").splitlines()):
            yield source / row["file_name"], row["text"]
    else:
        yield from windows(source)
