"""What four decisions of this project are worth: LoRAs trained with and without each, on the small model.

    python benchmarks/design_decisions.py WORK --seeds 5 --steps 300 --json design-decisions.json

A LoRA learns pink stars, which the small model never saw, beside scenes that it knows. What is compared is the loss on
held-out clips, with fixed noise at fixed timesteps, after the same steps with the same seeds:

- moments: a fresh posterior sample each epoch, against one that is drawn once;
- draws: a bank of K = 1, 4, 8, 32 noised first frames a clip, against noise that is new every time (image-to-video);
- tiling: latents encoded whole, against latents encoded in tiles. The tiles of the small VAE are 48x80 in a picture of
  96x144, the same share of it as in the real model, where they are 240x360 in 480x720. Its convolutions see as many
  latent pixels as those of the real one, so seams take a larger share of the picture here: an upper bound;
- noising: noise added and targets made in float32, against bfloat16.

All else of a run is the same, draw for draw, so differences are taken seed by seed; their spread over the seeds says
which of them mean something. It runs on a CPU or a GPU. What a run makes stays in WORK and is not made again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import typer

DRAWS = (1, 4, 8, 32)
BATCH = 8
Patch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Way:
    """One way to train: its name, the shards, and what of the trainer is replaced."""

    name: str
    shards: str
    patch: Patch = nullcontext


AS_IT_IS = Way("as it is", "t2v")
FRESH = "fresh noise every time"


def ways(part: str) -> list[Way]:
    """The ways of a part, the one that others are compared with first."""
    return {
        "moments": [AS_IT_IS, Way("one frozen sample", "t2v", frozen_sample)],
        "draws": [Way(FRESH, "i2v", fresh_draws), *(Way(f"K = {k}", "i2v", bank(k)) for k in DRAWS)],
        "tiling": [AS_IT_IS, Way("tiled", "t2v-tiled")],
        "noising": [AS_IT_IS, Way("bfloat16", "t2v", bfloat16_noising)],
    }[part]


PARTS = ("moments", "draws", "tiling", "noising")


@contextmanager
def frozen_sample() -> Iterator[None]:
    """The posterior's noise of a clip is that of the first epoch in all."""
    from cogcache.train.data import Samples

    normal = Samples._normal

    def frozen(self: Samples, epoch: int, record: Any, purpose: str, shape: tuple[int, ...]) -> Any:
        return normal(self, 0 if purpose == "posterior" else epoch, record, purpose, shape)

    with mock.patch.object(Samples, "_normal", frozen):
        yield


def bank(count: int) -> Patch:
    """Only the first ``count`` draws of a clip's first frame are there."""
    return lambda: _image(lambda record, _epoch, part: record.images[int(part * count)])


@contextmanager
def _image(choose: Callable[[Any, int, float], str]) -> Iterator[None]:
    from cogcache.train.data import Samples

    def image(self: Samples, epoch: int, record: Any) -> str:
        return choose(record, epoch, self._uniform(epoch, record, "image"))

    with mock.patch.object(Samples, "_image", image):
        yield


def fresh_draws() -> AbstractContextManager[None]:
    """Every epoch has a draw of its own, so none comes twice; the bank is made large enough."""
    return _image(lambda record, epoch, _part: record.images[epoch])


@contextmanager
def bfloat16_noising() -> Iterator[None]:
    """Clean latents, noise, alphas and all that is made of them are in bfloat16, as in the reference trainer."""
    import torch

    from cogcache.train import objective

    def rounded(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tensors: function(*(tensor.to(torch.bfloat16) for tensor in tensors)).float()

    with (
        mock.patch.object(objective, "add_noise", rounded(objective.add_noise)),
        mock.patch.object(objective, "velocity", rounded(objective.velocity)),
    ):
        yield


@dataclass(frozen=True)
class Plan:
    """Where, how long and with what."""

    work: Path
    steps: int
    clips: int
    held_out: int
    device: str
    models: Path | None

    @property
    def epochs(self) -> int:
        """No fewer than are begun."""
        return self.steps // (2 * self.clips // BATCH or 1) + 1

    def model(self, shards: str) -> Path:
        """Folder of the model that these shards are for."""
        from cogcache.small import small_model

        kind = shards.removesuffix("-tiled")
        if self.models is not None:
            return self.models / kind
        out = self.work / "models" / kind
        return out if out.exists() else small_model(kind, out)


def shards(plan: Plan, name: str) -> Path:
    """The concept's clips, encoded."""
    from cogcache.cli import run
    from cogcache.small.concept import choose_concept, write_concept

    clips, out = plan.work / "clips", plan.work / "shards" / name
    if not clips.exists():
        clips.mkdir(parents=True)
        write_concept(clips, choose_concept(plan.clips, plan.clips, plan.held_out))
    if not out.exists():
        words = [
            "encode",
            "--data-root",
            clips,
            "--model",
            plan.model(name),
            "--shards",
            out,
        ]
        words += [
            "--frames",
            17,
            "--size",
            "96x144",
            "--fps",
            8,
            "--vae-dtype",
            "float32",
            "--text-dtype",
            "float32",
        ]
        words += ["--tiling", "on" if name.endswith("-tiled") else "off", "--device", plan.device]
        words += ["--image-draws", max(*DRAWS, plan.epochs)] if name == "i2v" else []
        if run([str(word) for word in words]):
            raise SystemExit(f"encoding {name} failed")
    return out


def lora_of(plan: Plan, way: Way, seed: int) -> Path:
    """Train one LoRA, unless it is there."""
    from cogcache.config import TrainConfig
    from cogcache.train import train

    output = plan.work / "runs" / f"{way.shards} {way.name}".replace(" ", "-") / str(seed)
    file = output / "pytorch_lora_weights.safetensors"
    if file.exists():
        return file
    settings: dict[str, Any] = {
        "memory": "plain",
        "gradient_checkpointing": False,
        "dtype": "float32",
    }
    with way.patch():
        return train(
            TrainConfig(
                shards=str(shards(plan, way.shards)), output=output, model=str(plan.model(way.shards)),
                steps=plan.steps, batch_size=BATCH, rank=32, alpha=32, lr=1e-3, lr_scheduler="cosine", seed=seed,
                target_modules=["attention+ff"], checkpoint_every=0, log_every=50, device=plan.device,
                holdout=str(plan.work / "clips" / "held-out.txt"), **settings,
            )
        ).lora  # fmt: skip


def losses(plan: Plan, way: Way, lora: Path | None) -> dict[str, float]:
    """Mean loss of held-out clips: ``new`` and ``known``; always on latents that were encoded whole."""
    from cogcache.bench.held_out import held_out_losses, stock_transformer
    from cogcache.cache.reader import CacheReader

    name = way.shards.removesuffix("-tiled")
    reader, model = CacheReader(shards(plan, name)), plan.model(name)
    rows = [row for row in reader.samples if row.source.startswith("held-out")]
    found = held_out_losses(reader, model, stock_transformer(model, lora), rows, plan.device)
    groups = {"new": "held-out-new", "known": "held-out-known"}
    return {
        name: statistics.fmean(v for source, row in found.items() if source.startswith(start) for v in row)
        for name, start in groups.items()
    }


def measure(plan: Plan, part: str, seeds: int) -> dict[str, Any]:
    """Losses of every way and seed, and of the base."""
    chosen = ways(part)
    return {
        "base": losses(plan, chosen[0], None),
        "ways": {
            way.name: [losses(plan, way, lora_of(plan, way, seed)) for seed in range(seeds)] for way in chosen
        },
        "facts": facts(plan, part),
    }


def facts(plan: Plan, part: str) -> dict[str, float]:
    """Figures of the latents that explain what comes out."""
    import torch

    from cogcache.cache.reader import CacheReader

    if part not in ("moments", "tiling"):
        return {}
    whole = CacheReader(shards(plan, "t2v"))
    if part == "moments":
        mean, logvar = torch.stack([whole.moments(row.latents).float() for row in whole.samples]).chunk(
            2, dim=1
        )
        return {"posterior spread / spread of the means": float((0.5 * logvar).exp().mean() / mean.std())}
    tiled = CacheReader(shards(plan, "t2v-tiled"))
    others = {row.source: row for row in tiled.samples}
    apart = [
        float((a - b).norm() / a.norm())
        for row in whole.samples
        for a, b in [
            (whole.moments(row.latents)[:16].float(), tiled.moments(others[row.source].latents)[:16].float())
        ]
    ]
    return {"relative error of tiled means": statistics.fmean(apart)}


def table(results: Mapping[str, Any]) -> str:
    """A line for each way: loss, and what it is above the first way of its part, seed by seed."""
    lines = [f"{'part':9}{'way':24}{'held-out, new':>18}{'difference':>20}{'known':>18}{'difference':>20}"]
    for part, found in results.items():
        reference = next(iter(found["ways"].values()))
        lines.append(f"{part:9}{'base':24}{found['base']['new']:18.5f}{'':20}{found['base']['known']:18.5f}")
        for name, rows in found["ways"].items():
            cells = ""
            for group in ("new", "known"):
                values = [row[group] for row in rows]
                apart = [a - b[group] for a, b in zip(values, reference, strict=True)]
                cells += f"{spread(values):>18}" + (
                    f"{spread(apart, signed=True):>20}" if any(apart) else " " * 20
                )
            lines.append(f"{'':9}{name:24}{cells}")
        lines += [f"{'':9}{name}: {value:.2g}" for name, value in found["facts"].items()]
    return "\n".join(line.rstrip() for line in lines)


def spread(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):{'+' if signed else ''}.5f} ± {deviation:.5f}"


def main(
    work: Annotated[Path, typer.Argument(help="Folder for clips, shards and LoRAs.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a run, of 8 clips each.")] = 300,
    clips: Annotated[int, typer.Option(min=4, help="Pink stars to train on, and as many other scenes.")] = 20,
    held_out: Annotated[int, typer.Option(min=1, help="Clips of each kind to measure by.")] = 12,
    part: Annotated[
        list[str] | None, typer.Option(help="moments, draws, tiling or noising; all by default.")
    ] = None,
    models: Annotated[
        Path | None, typer.Option(help="Folder of t2v and i2v. Default: the package's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
) -> None:
    """Train and measure, print a table."""
    from cogcache.bench.facts import machine_facts

    plan, started, results = Plan(work, steps, clips, held_out, device, models), time.perf_counter(), {}
    for name in part or PARTS:
        results[name] = measure(plan, name, seeds)
        report = {
            "seeds": seeds, "steps": steps, "batch": BATCH, "clips": clips, "held_out": held_out,
            "seconds": time.perf_counter() - started, "machine": machine_facts(), "results": results,
        }  # fmt: skip
        if as_json:
            as_json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
