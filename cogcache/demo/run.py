"""Takes the built-in clips through every stage, on a model that comes with the package or is made on the spot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.markup import escape
from rich.table import Table

from cogcache.cache.format import SampleRecord
from cogcache.cache.reader import CacheReader
from cogcache.config import EncodeConfig, InferConfig, TrainConfig
from cogcache.demo.page import demo_page
from cogcache.demo.picture import draw_demo
from cogcache.demo.recipe import Recipe, Task, choose_recipe
from cogcache.demo.show import Clip, Show, read_losses, real_and_decoded, with_generations
from cogcache.errors import ConfigError
from cogcache.progress import console, say
from cogcache.tiny import Family
from cogcache.variants import read_variant

__all__ = ["CLIPS", "DemoResult", "run_demo"]

CLIPS = Path(__file__).parent / "bunny"
"""Eight cuts of Big Buck Bunny with captions; see ATTRIBUTION.md there."""

_SEED = 42
T = TypeVar("T")


@dataclass
class DemoResult:
    """Where things are: name to path, and seconds each step took."""

    output: Path
    made: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """What ``work`` returns; its seconds are noted."""
        started = time.monotonic()
        made = work()
        self.seconds[name] = time.monotonic() - started
        return made


def run_demo(
    output: Path, family: Family | None = None, steps: int | None = None, task: Task | None = None
) -> DemoResult:
    """Run encode, train and infer on the built-in clips; draw ``demo.png`` and write ``demo.html``.

    Safe to run again: finished parts are reused by the stages themselves.

    Args:
        output: Folder for everything made; created if needed.
        family: Which family's facts the model has. Default: 5b, or what of it does the task.
        steps: Optimizer steps. Default: 130 with a small model, 60 with a tiny one.
        task: Text-to-video or image-to-video. Default: that of the family.

    Raises:
        ConfigError: if ``output`` holds a demo of another model, or no model of the family does the task.
    """
    recipe, result = choose_recipe(family, task, steps), DemoResult(output)
    output.mkdir(parents=True, exist_ok=True)
    _check_model(output, recipe)
    say(f"1/5  Making a {recipe.what}")
    model = result.timed("model", lambda: recipe.make_model(output / "model"))
    encoding = EncodeConfig(data_root=CLIPS, model=str(model), shards=output / "shards", **recipe.encode())
    shards = result.timed("encode", lambda: _encode(encoding))
    lora = result.timed("train", lambda: _train(output, shards, recipe))
    rows = _shown(shards, recipe)
    videos = result.timed("infer", lambda: _infer(output, model, lora, rows, recipe))
    show = result.timed("show", lambda: _show(output, encoding, rows, videos, recipe))
    result.made |= {"model": model, "encode": shards, "train": lora, "infer": videos[1][0], "show": show}
    _tell(result, recipe)
    return result


def _check_model(output: Path, recipe: Recipe) -> None:
    mark = output / "family.json"
    if mark.is_file():
        found = json.loads(mark.read_text("utf-8"))
        if found != recipe.what:
            raise ConfigError(
                f"{output} holds a demo of a {found}, not of a {recipe.what}.",
                "Give another --output, or delete it.",
            )
    mark.write_text(json.dumps(recipe.what), "utf-8")


def _encode(config: EncodeConfig) -> Path:
    from cogcache.precompute import encode

    say("2/5  Encoding eight clips and their captions")
    return encode(config).shards


def _train(output: Path, shards: Path, recipe: Recipe) -> Path:
    from cogcache.train import train

    lora = output / "run" / "pytorch_lora_weights.safetensors"
    if lora.is_file():
        return lora
    say("3/5  Training a LoRA on the shards: transformer only, no VAE, no T5")
    config = TrainConfig(
        shards=shards,
        output=output / "run",
        steps=recipe.steps,
        checkpoint_every=max(1, recipe.steps // 2),
        resume="latest" if list((output / "run").glob("checkpoint-*")) else None,
        workers=0,
        **recipe.train(),
    )
    return train(config).lora


def _shown(shards: Path, recipe: Recipe) -> list[SampleRecord]:
    """The clips to show, in the order of the recipe."""
    names = (CLIPS / "videos.txt").read_text("utf-8").splitlines()
    rows = {row.source: row for row in CacheReader(shards).samples}
    return [rows[names[number]] for number in recipe.shown]


def _infer(
    output: Path, model: Path, lora: Path, rows: list[SampleRecord], recipe: Recipe
) -> tuple[list[Path], list[Path]]:
    """Videos of the base model and of the LoRA, from the same starting noise: each clip with all its seeds."""
    from cogcache.infer import infer

    say("4/5  Generating videos with the stock diffusers pipeline, without and with the LoRA")
    each = [row for row in rows for _ in range(recipe.seeds)]
    image_to_video = read_variant(model).task == "i2v"
    config = InferConfig(
        overwrite=True,
        model=str(model),
        prompt=[row.caption for row in each],
        image=[_first_frame(output, row) for row in each] if image_to_video else [],
        output=output / "base.mp4",
        frames=each[0].frames,
        size=f"{each[0].height}x{each[0].width}",
        fps=each[0].fps,
        seed=_SEED,
        **recipe.infer(),
    )
    return infer(config), infer(config.model_copy(update={"lora": lora, "output": output / "lora.mp4"}))


def _first_frame(output: Path, row: SampleRecord) -> Path:
    """Of a clip, as a picture file."""
    from PIL import Image

    from cogcache.video import open_video

    path = output / f"first-frame-{Path(row.source).stem}.png"
    with open_video(CLIPS / row.source, "auto") as reader:
        Image.fromarray(reader.read([0])[0]).save(path)
    return path


def _show(
    output: Path,
    encoding: EncodeConfig,
    rows: list[SampleRecord],
    videos: tuple[list[Path], list[Path]],
    recipe: Recipe,
) -> Path:
    """Draw the picture and write the page."""
    say("5/5  Drawing what came out")
    clips, count = list[Clip](), recipe.seeds
    for number, clip in enumerate(real_and_decoded(encoding, rows)):
        mine = range(number * count, (number + 1) * count)
        base, lora = ([made[n] for n in mine] for made in videos)
        clips.append(with_generations(clip, [_SEED + n for n in mine], base, lora))
    losses = read_losses(output / "run" / "metrics.jsonl")
    title = f"cogcache demo, {recipe.what}"
    content = Show(title, recipe.remark, rows[0].fps or 8.0, clips, losses)
    draw_demo(content, output / "demo.png")
    (output / "demo.html").write_text(demo_page(content), "utf-8")
    return output / "demo.html"


def _tell(result: DemoResult, recipe: Recipe) -> None:
    what = {
        "model": recipe.what,
        "encode": "latents of 8 clips, embeddings of 8 captions and the empty one",
        "train": "LoRA",
        "infer": "generated videos: base-*.mp4 and lora-*.mp4",
        "show": "all of it side by side, with the loss curve; the same in demo.png",
    }
    table = Table("step", "made", "where", "seconds", title="Demo", title_justify="left")
    for name, path in result.made.items():
        table.add_row(name, what[name], escape(str(path)), f"{result.seconds[name]:.1f}")
    console().print(table)
    say(recipe.remark)
