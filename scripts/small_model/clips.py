"""The clips that the small model learns from: the made-up world, and footage if there is some."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from cogcache.mp4 import read_mp4, write_mp4
from cogcache.small import Scene, all_scenes, render
from cogcache.small.architecture import FRAMES, HEIGHT, WIDTH

FPS = 8.0


def write_clips(root: Path, scenes: Sequence[Scene], footage: Sequence[Path], workers: int) -> None:
    """Clips with ``metadata.jsonl``, as ``cogcache encode`` takes them.

    Args:
        footage: JSON lines files, each line ``{"file", "start", "end", "caption"}`` with seconds; files relative to it.
    """
    (root / "videos").mkdir(parents=True, exist_ok=True)
    rows = [
        {"file_name": f"videos/{number:05}.mp4", "text": scene.caption} for number, scene in enumerate(scenes)
    ]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_write, [root / row["file_name"] for row in rows], scenes, chunksize=64))
    for number, (frames, caption) in enumerate(pair for file in footage for pair in _windows(file)):
        name = f"videos/footage-{number:04}.mp4"
        write_mp4(root / name, frames, FPS)
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


def _windows(file: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Overlapping windows of each shot, half a window apart."""
    for line in file.read_text("utf-8").splitlines():
        shot = json.loads(line)
        yield from _shot(file.parent / shot["file"], shot["start"], shot["end"], shot["caption"])


def _shot(path: Path, start: float, end: float, caption: str) -> Iterator[tuple[np.ndarray, str]]:
    import av

    wanted = np.arange(start, end, 1 / FPS)
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if (
                len(frames) < len(wanted)
                and frame.time is not None
                and frame.time >= wanted[len(frames)] - 1e-3
            ):
                height = HEIGHT
                width = max(WIDTH, round(frame.width * HEIGHT / frame.height / 2) * 2)
                picture = frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
                left = (width - WIDTH) // 2
                frames.append(picture[:, left : left + WIDTH])
    for first in range(0, len(frames) - FRAMES + 1, FRAMES // 2):
        yield np.stack(frames[first : first + FRAMES]), caption
