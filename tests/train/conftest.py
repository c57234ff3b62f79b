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
from making_caches import SMALL, Clip, write_cache

from cogcache.config import TrainConfig
from cogcache.tiny import Family
from cogcache.variants import Variant, read_variant


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
    return [{k: v for k, v in line.items() if k != "seconds" and not k.endswith("_s")} for line in lines]
