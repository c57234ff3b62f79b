"""Small data roots, and encoding in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from making_videos import picture, write_video

from cogcache.config import EncodeConfig
from cogcache.tiny import Family

CAPTIONS = (
    "A rabbit stretches in front of its burrow.",
    "A bird sings, the leaves move.",
    "Two squirrels run along a branch, then one of them stops and looks into the camera for a long time.",
    "Ein Häschen im Grünen",
    "A meadow",
    "A bird sings, the leaves move.",  # as another clip's: one embedding serves both
    "",  # replaced below: each clip needs a caption of its own length
    "x",
)


@pytest.fixture(scope="session")
def clips_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of 96x160 at 24 fps with sidecar captions, one of them with a caption of 300 words. Read only."""
    root = tmp_path_factory.mktemp("clips")
    for number, caption in enumerate(CAPTIONS):
        write_video(root / f"{number}.mp4", frames=30, image=lambda n, offset=number: picture(n + 9 * offset))
        (root / f"{number}.txt").write_text(caption or "a very long caption " * 75, "utf-8")
    return root


@pytest.fixture
def settings(
    clips_root: Path, tiny_models: Callable[[Family], Path], tmp_path: Path
) -> Callable[..., EncodeConfig]:
    """Encoding of the eight clips, 9 frames of 32x48, with the tiny 5B model; keyword arguments change it."""

    def make(family: Family = "5b", **changes: Any) -> EncodeConfig:
        values = {
            "data_root": clips_root,
            "shards": tmp_path / "shards",
            "frames": 9,
            "size": "32x48",
            "fps": "source",
            "device": "cpu",
        }
        if "model" not in changes:
            values["model"] = str(tiny_models(family))
        return EncodeConfig(**{**values, **changes})

    return make


class EncodeServer:
    """Runs ``cogcache encode`` in processes of their own without paying for imports each time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._runs = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("encode_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            text=True,
        )

    def run(
        self,
        *configs: EncodeConfig,
        after_s: float | None = None,
        after_lines: int | None = None,
        signal_number: int = signal.SIGKILL,
        file_limit: int | None = None,
    ) -> tuple[list[int], str, float]:
        """Exit codes (negative: killed by that signal), what was written to standard error, seconds."""
        self._runs += 1
        log = self._folder / f"{self._runs:03d}.log"
        request = {
            "log": str(log),
            "configs": [config.model_dump(mode="json", exclude_unset=True) for config in configs],
            "signal": signal_number,
            "after_s": after_s,
            "after_lines": after_lines,
            "file_limit": file_limit,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"codes": [], "seconds": 0}')
        said = log.read_text("utf-8") if log.exists() else ""
        assert answer["codes"], said
        return answer["codes"], said, answer["seconds"]

    def close(self) -> None:
        """End the server."""
        self._process.communicate()


@pytest.fixture(scope="session")
def encode_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncodeServer]:
    """A running :class:`EncodeServer`."""
    server = EncodeServer(tmp_path_factory.mktemp("encode-server"))
    yield server
    server.close()
