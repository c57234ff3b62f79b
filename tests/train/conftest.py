"""A small cache of random latents, made without any encoder, and a way to train on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cogcache.cache.format import Entry, Identity, ModelRecord, SampleRecord, ValidationRecord, entry_key
from cogcache.cache.writer import CacheWriter
from cogcache.config import TrainConfig
from cogcache.geometry import Size
from cogcache.tiny import Family
from cogcache.variants import Variant, read_variant

Clip = tuple[int, Size]
SMALL: Clip = (9, Size(32, 48))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_cache(
    root: Path,
    model: Path,
    clips: list[Clip],
    *,
    dtype: str = "float32",
    seed: int = 0,
    bad: int | None = None,
    prompts: int = 0,
) -> Path:
    """A cache with one random entry for each of ``clips`` (frames, size); number ``bad`` holds a NaN.

    With ``prompts`` it also has that many for validation, with images of the first clip's size.
    """
    variant = read_variant(model)
    source = torch.Generator().manual_seed(seed)
    series = ["latents", "text"] + (["images"] if variant.task == "i2v" else [])
    prints = {name: {"made_by": "test", "seed": seed, "series": name} for name in series}
    identity = Identity(model=ModelRecord(id=str(model), variant=variant), series=prints)
    entries: dict[str, list[Entry]] = {name: [] for name in series}

    def add(name: str, number: object, tensors: dict[str, torch.Tensor]) -> str:
        key = entry_key(prints[name], number=number)
        cast = {field: value.to(DTYPES[dtype]) for field, value in tensors.items()}
        entries[name].append(Entry(key, cast, {"number": str(number)}))
        return key

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source)

    def text(number: object) -> str:
        return add("text", number, {"prompt_embeds": normal(variant.text_length, variant.text_dim)})

    samples = []
    for number, (frames, size) in enumerate(clips):
        c, f, h, w = variant.latent_shape(frames, size)
        moments = torch.cat([normal(c, f, h, w), normal(c, f, h, w) * 0.5 - 2])
        if number == bad:
            moments[0, 0, 0, 0] = torch.nan
        images = ()
        if variant.task == "i2v":
            images = tuple(add("images", (number, k), {"latents": normal(c, 1, h, w)}) for k in range(3))
        samples.append(
            SampleRecord(
                id=f"clip-{number:03d}",
                source=f"clip-{number:03d}.mp4",
                window="start",
                caption=f"clip {number}",
                frames=frames,
                height=size.height,
                width=size.width,
                fps=8.0,
                latents=add("latents", number, {"moments": moments}),
                text=text(number),
                images=images,
            )
        )
    empty = text("empty")
    validation = []
    for number in range(prompts):
        c, _, h, w = variant.latent_shape(*clips[0])
        wants_image = variant.task == "i2v"
        image = add("images", ("clean", number), {"latents": normal(c, 1, h, w)}) if wants_image else None
        name = f"{number}.png" if wants_image else None
        validation.append(
            ValidationRecord(
                prompt=f"prompt {number}", text=text(f"prompt {number}"), image=image, image_name=name
            )
        )
    writer = CacheWriter.open(root, identity)
    for name, items in entries.items():
        by_key = {entry.key: entry for entry in items}
        writer.plan(name, list(by_key), 100)
        for job in writer.jobs(name, set(by_key)):
            with job:
                for key in job.remaining:
                    job.append(by_key[key])
                job.finish()
    writer.commit(samples, [], empty, validation)
    return root


@pytest.fixture(scope="session")
def make_cache(
    tiny_models: Callable[[Family], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``make_cache("5b", clips)``: a folder, made once a session for equal arguments. Read only."""
    made: dict[str, Path] = {}

    def make(family: Family, clips: list[Clip] | None = None, **options: Any) -> Path:
        clips = clips or [SMALL] * 3
        name = repr((family, clips, options))
        if name not in made:
            root = tmp_path_factory.mktemp("cache") / "shards"
            made[name] = write_cache(root, tiny_models(family), clips, **options)
        return made[name]

    return make


@pytest.fixture
def settings(make_cache: Callable[..., Path], tmp_path: Path) -> Callable[..., TrainConfig]:
    """A short training of the tiny 5B model; keyword arguments change it."""

    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "output": tmp_path / "run",
            "steps": 3,
            "batch_size": 1,
            "rank": 2,
            "alpha": 1.0,
            "lr": 1e-2,
            "checkpoint_every": 0,
            "device": "cpu",
            "workers": 0,
            "gradient_checkpointing": False,
        }
        if "shards" not in changes:
            values["shards"] = make_cache("5b")
        return TrainConfig(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads ``metrics.jsonl`` of an output folder, without what depends on the clock."""
    return metrics_of


@pytest.fixture
def variant_of(tiny_models: Callable[[Family], Path]) -> Callable[[Family], Variant]:
    """Facts of a tiny model."""
    return lambda family: read_variant(tiny_models(family))


class TrainServer:
    """Runs trainings in processes of their own without paying for imports each time."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._stream = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("train_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stream,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def run(
        self,
        config: TrainConfig,
        *,
        processes: int = 1,
        kill_after: float | None = None,
        trace: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> tuple[list[int], float]:
        """Exit codes (negative: killed by that signal) and seconds.

        For every video that a process samples it adds a line to the file ``trace``: rank and seed of the noise.
        """
        request = {
            "config": config.model_dump(mode="json"),
            "processes": processes,
            "kill_after": kill_after,
            "trace": str(trace) if trace else None,
            "environment": environment or {},
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"codes": [], "seconds": 0}')
        assert answer["codes"], self.log.read_text()
        return answer["codes"], answer["seconds"]

    def close(self) -> None:
        """End the server."""
        self._process.communicate()
        self._stream.close()


@pytest.fixture(scope="session")
def train_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainServer]:
    """A running :class:`TrainServer`."""
    server = TrainServer(tmp_path_factory.mktemp("server") / "log.txt")
    yield server
    server.close()


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "samples_per_s")} for line in lines]
