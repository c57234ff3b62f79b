"""How well the small models follow their captions: generate scenes they never saw, and read them back.

    python scripts/small_model/follow.py WORK [--kinds t2v t2v-1.5] [--prompts 40] [--guidance 2 6] [--json FILE]

WORK/models is what ``make.py`` made. A video is read by comparing it with what the made-up world would show: of
the scenes that differ from the caption in one word, the one nearest to the video says which word was followed. Prints
for each kind of word how often it was that of the caption, beside chance.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clips import choose_scenes
from make import FULL

from cogcache.quiet import quiet_libraries
from cogcache.small import KINDS, NOVEL, Scene, render
from cogcache.small.architecture import FRAMES, HEIGHT, WIDTH
from cogcache.small.shapes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES

WORDS: dict[str, list[str]] = {
    "shape": [word for word in SHAPES if word not in NOVEL],
    "colour": [word for word in COLOURS if word not in NOVEL],
    "size": list(SIZES),
    "motion": list(MOTIONS),
    "background": list(BACKGROUNDS),
}
"""What a caption can say, but for what no model was shown."""

PLACES = 9
"""Where to look for the shape: a scene's seed decides where its way lies, and no caption tells."""

STEPS, GUIDANCE, BATCH = 25, 6.0, 8
SEED = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["t2v", "t2v-1.5"])
    parser.add_argument("--prompts", type=int, choices=range(1, FULL["held_out"] + 1), default=FULL["held_out"],
                        metavar="NUMBER", help=f"at most {FULL['held_out']}, the default")  # fmt: skip
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[GUIDANCE], help="one or several; default: 6"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    scenes, found = unseen(given.prompts), dict[str, dict[str, dict[str, float]]]()
    for kind, guidance in itertools.product(given.kinds, given.guidance):
        videos = np.concatenate(list(generate(given.work / "models" / kind, scenes, guidance)))
        row = found.setdefault(kind, {})[f"guidance {guidance:g}"] = shares(scenes, videos)
        print(kind, guidance, *(f"{word} {share:.0%}" for word, share in row.items()), sep="  ", flush=True)
    print("chance", *(f"{word} {1 / len(values):.0%}" for word, values in WORDS.items()), sep="  ")
    if given.json:
        given.json.write_text(json.dumps({"prompts": given.prompts, "followed": found}, indent=2) + "\n")


def unseen(count: int) -> list[Scene]:
    """Scenes that ``make.py`` holds out, of words that it shows."""
    _, held_out = choose_scenes(0, FULL["held_out"])
    return [replace(scene, seed=SEED + number) for number, scene in enumerate(held_out[:count])]


def generate(model: Path, scenes: Sequence[Scene], guidance: float) -> Iterator[Any]:
    """Videos of the scenes' captions, uint8 [B, F, H, W, 3], scene number N with seed N."""
    import diffusers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet_libraries():
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(scenes), BATCH):
        some = scenes[first : first + BATCH]
        seeds = [torch.Generator().manual_seed(first + number) for number in range(len(some))]
        frames = pipe(
            prompt=[scene.caption for scene in some], num_frames=FRAMES, height=HEIGHT, width=WIDTH,
            num_inference_steps=STEPS, guidance_scale=guidance, generator=seeds, output_type="np",
        ).frames  # fmt: skip
        yield (np.asarray(frames) * 255).round().astype(np.uint8)


def shares(scenes: Sequence[Scene], videos: Any) -> dict[str, float]:
    """How often each kind of word was followed."""
    return {
        word: float(
            np.mean(
                [
                    nearest(scene, video, word) == getattr(scene, word)
                    for scene, video in zip(scenes, videos, strict=True)
                ]
            )
        )
        for word in WORDS
    }


def nearest(scene: Scene, video: Any, word: str) -> str:
    """The value of a word with which the scene looks most like the video."""
    return min(WORDS[word], key=lambda value: _distance(replace(scene, **{word: value}), video))


def _distance(scene: Scene, video: Any) -> float:
    """Mean squared difference at the likeliest place; of every fourth frame, which is enough to see a motion."""
    seen = video[::4].astype(np.float32)
    shown = (render(replace(scene, seed=seed), *seen.shape[:3]) for seed in range(PLACES))
    return min(float(np.square(clip - seen).mean()) for clip in shown)


if __name__ == "__main__":
    main()
