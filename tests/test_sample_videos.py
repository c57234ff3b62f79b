"""From prompts to sample videos: what training shows is what inference will generate.

Mutations tried, each caught: the base sampled without its LoRA; the empty embedding for the prompt's; another seed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from making_videos import picture, write_video

from cogcache.config import EncodeConfig, InferConfig, TrainConfig
from cogcache.infer import infer
from cogcache.mp4 import read_mp4
from cogcache.precompute import encode
from cogcache.tiny import Family
from cogcache.train import train

PROMPTS = ["A rabbit in the snow", "Two bears"]


def test_sample_videos_are_those_of_infer_with_the_checkpoint(
    tiny_models: Callable[[Family], Path], tmp_path: Path
) -> None:
    """With 1.5's padding. Without the LoRA the pictures are visibly others."""
    model, clips = str(tiny_models("1.5-5b")), tmp_path / "clips"
    clips.mkdir()
    write_video(clips / "a.mp4", frames=9, image=picture)
    (clips / "a.txt").write_text("A meadow")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    shards = tmp_path / "shards"
    encode(
        EncodeConfig(
            data_root=clips, model=model, shards=shards, frames=9, size="32x48", fps="source", device="cpu",
            validation_prompts=tmp_path / "prompts.txt",
        )
    )  # fmt: skip
    shutil.rmtree(clips)
    run = train(
        TrainConfig(
            shards=shards, output=tmp_path / "run", steps=4, rank=8, alpha=64, lr=0.05, device="cpu", workers=0,
            validate_every=4, sample_steps=3, sample_seed=7,
        )
    )  # fmt: skip
    shown = [read_mp4(run.output / "samples" / "step-000004" / f"{n:03d}.mp4")[0] for n in (0, 1)]

    def generate(name: str, lora: Path | None) -> list[np.ndarray]:
        config = InferConfig(
            model=model, lora=lora, prompt=PROMPTS, output=tmp_path / f"{name}.mp4", frames=9, size="32x48",
            steps=3, seed=7, device="cpu",
        )  # fmt: skip
        return [read_mp4(path)[0] for path in infer(config)]

    with_lora, without = generate("with", run.weights), generate("without", None)
    for ours, theirs, base in zip(shown, with_lora, without, strict=True):
        lora_matters = np.abs(ours.astype(float) - base).mean()
        assert lora_matters > 8
        assert (
            np.abs(ours.astype(float) - theirs).mean() < lora_matters / 4
        )  # what x264 makes of equal pictures
    assert np.abs(shown[0].astype(float) - shown[1]).mean() > 5
