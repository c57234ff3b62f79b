"""Takes the built-in clips through every stage, on a tiny model made on the spot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.markup import escape
from rich.table import Table

from cogcache.config import EncodeConfig, InferConfig, TrainConfig
from cogcache.demo.picture import DemoPicture, draw_demo
from cogcache.errors import ConfigError
from cogcache.progress import console, say
from cogcache.tiny import Family
from cogcache.variants import read_variant

__all__ = ["CLIPS", "DemoResult", "run_demo"]

CLIPS = Path(__file__).parent / "bunny"
"""Eight cuts of Big Buck Bunny with captions; see ATTRIBUTION.md there."""

_SHOWN_CLIP = 5
T = TypeVar("T")


@dataclass
class DemoResult:
    """Where things are: name to path, and seconds each step took."""

    output: Path
    made: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def run_demo(output: Path, family: Family, steps: int = 60) -> DemoResult:
    """Run encode, train and infer on the built-in clips and draw ``demo.png``.

    Safe to run again: finished parts are reused by the stages themselves.

    Args:
        output: Folder for everything made; created if needed.
        family: Which family's facts the tiny model has.
        steps: Optimizer steps.

    Raises:
        ConfigError: if ``output`` holds a demo of another family.
    """
    result = DemoResult(output)
    output.mkdir(parents=True, exist_ok=True)
    _check_family(output, family)
    prompt = (CLIPS / "prompts.txt").read_text("utf-8").splitlines()[_SHOWN_CLIP]
    model = _timed(result, "model", lambda: _model(output, family))
    shards = _timed(result, "encode", lambda: _encode(output, model))
    lora = _timed(result, "train", lambda: _train(output, shards, steps))
    videos = _timed(result, "infer", lambda: _infer(output, model, lora, prompt))
    result.made |= {"model": model, "encode": shards, "train": lora, "infer": videos[0]}
    result.made["picture"] = _timed(
        result, "picture", lambda: _picture(output, lora, videos[0], family, prompt)
    )
    _tell(result)
    return result


def _timed(result: DemoResult, name: str, work: Callable[[], T]) -> T:
    started = time.monotonic()
    made = work()
    result.seconds[name] = time.monotonic() - started
    return made


def _check_family(output: Path, family: Family) -> None:
    mark = output / "family.json"
    if mark.is_file():
        found = json.loads(mark.read_text("utf-8"))
        if found != family:
            raise ConfigError(
                f"{output} holds a demo of family {found}.", "Give another --output, or delete it."
            )
    mark.write_text(json.dumps(family), "utf-8")


def _model(output: Path, family: Family) -> Path:
    from cogcache.tiny import build_tiny_model

    model = output / "model"
    if model.is_dir():
        return model
    say(f"1/4  Making a tiny {family} model with random weights")
    return build_tiny_model(model, family)


def _encode(output: Path, model: Path) -> Path:
    from cogcache.precompute import encode

    say("2/4  Encoding eight clips and their captions")
    return encode(EncodeConfig(data_root=CLIPS, model=str(model), shards=output / "shards")).shards


def _train(output: Path, shards: Path, steps: int) -> Path:
    from cogcache.train import train

    lora = output / "run" / "pytorch_lora_weights.safetensors"
    if lora.is_file():
        return lora
    say("3/4  Training a LoRA on the shards: transformer only, no VAE, no T5")
    config = TrainConfig(
        shards=shards,
        output=output / "run",
        steps=steps,
        rank=16,
        alpha=8,
        lr=2e-3,
        checkpoint_every=max(1, steps // 2),
        resume="latest" if list((output / "run").glob("checkpoint-*")) else None,
        workers=0,
    )
    return train(config).lora


def _infer(output: Path, model: Path, lora: Path, prompt: str) -> list[Path]:
    from cogcache.infer import infer

    say("4/4  Generating a video with the stock diffusers pipeline")
    image = [_first_frame(output / "first-frame.png")] if read_variant(model).task == "i2v" else []
    return infer(
        InferConfig(
            overwrite=True, lora=lora, prompt=[prompt], image=image, output=output / "generated.mp4", steps=10
        )
    )


def _first_frame(path: Path) -> Path:
    """Of the clip that the picture shows."""
    from PIL import Image

    from cogcache.video import open_video

    with open_video(_shown_clip(), "auto") as reader:
        Image.fromarray(reader.read([0])[0]).save(path)
    return path


def _shown_clip() -> Path:
    return sorted((CLIPS / "videos").iterdir())[_SHOWN_CLIP]


def _picture(output: Path, lora: Path, video: Path, family: Family, prompt: str) -> Path:
    from cogcache.video import open_video

    generated = open_video(video, "auto")
    fps = generated.info.fps
    source = open_video(_shown_clip(), "auto")
    lines = (lora.parent / "metrics.jsonl").read_text("utf-8").splitlines()
    losses = [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]
    picks = range(0, generated.info.frames, max(1, generated.info.frames // 5))
    times = [index / fps for index in picks][:5]
    content = DemoPicture(
        family=family,
        prompt=prompt,
        source=source.read([_index_at(source.timestamps, t) for t in times]),
        generated=generated.read(list(picks)[:5]),
        losses=losses,
    )
    path = output / "demo.png"
    draw_demo(content, path)
    return path


def _index_at(timestamps: object, time_s: float) -> int:
    import numpy as np

    found = int(np.searchsorted(np.asarray(timestamps), time_s + 1e-6, side="right"))
    return max(0, found - 1)


def _tell(result: DemoResult) -> None:
    what = {
        "model": "tiny model, random weights",
        "encode": "latents of 8 clips, embeddings of 8 captions and the empty one",
        "train": "LoRA",
        "infer": "generated video",
        "picture": "input frames, generated frames, loss curve",
    }
    table = Table("step", "made", "where", "seconds", title="Demo", title_justify="left")
    for name, path in result.made.items():
        table.add_row(name, what[name], escape(str(path)), f"{result.seconds[name]:.1f}")
    console().print(table)
    say("The model's weights are random, so the generated frames are noise: this shows the way, not quality.")
