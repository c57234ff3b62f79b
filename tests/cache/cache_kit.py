"""A tiny encode run over made-up entries, and ways to disturb it. Imports nothing but the cache."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from cogcache.cache import files
from cogcache.cache.backend import backend_of
from cogcache.cache.format import (
    IDENTITY_FILE,
    LATENTS,
    TEXT,
    BackendName,
    Entry,
    FailureRecord,
    Identity,
    Manifest,
    ModelRecord,
    SampleRecord,
    digest,
)
from cogcache.cache.identity import read_identity
from cogcache.cache.writer import CacheWriter
from cogcache.variants import Variant

VARIANT = Variant(
    in_channels=4,
    latent_channels=4,
    num_layers=1,
    num_attention_heads=1,
    attention_head_dim=8,
    patch_size=2,
    patch_size_t=None,
    positions="rope",
    ofs=False,
    sample_frames=49,
    sample_height=60,
    sample_width=90,
    text_length=8,
    text_dim=8,
    spatial_factor=8,
    temporal_factor=4,
    scaling_factor=0.7,
    invert_scale_latents=False,
    snr_shift_scale=1.0,
    num_train_timesteps=1000,
)
BACKEND: BackendName = "webdataset"
"""How new caches are stored; the fixture ``backend`` sets it. A cache that is there keeps its own."""
CLIPS = 5
CLIPS_PER_SHARD = 3
BAD = 1
"""The clip that always fails."""


def backend_for(root: Path) -> BackendName:
    """Also right in processes of their own, which know nothing of fixtures."""
    path = root / IDENTITY_FILE
    return read_identity(root).backend if path.exists() else BACKEND


def begin(root: Path) -> Path:
    """Let processes of their own know the backend under test, from the cache itself."""
    if BACKEND != "webdataset":
        CacheWriter.open(root, identity())
    return root


def identity(root: Path | None = None, **series: dict[str, Any]) -> Identity:
    backend = backend_for(root) if root else BACKEND
    known = {LATENTS: {"size": "32x32", "dtype": "float32"}, TEXT: {"length": 8}}
    model = ModelRecord(id="model", variant=VARIANT)
    return Identity(backend=backend, model=model, series={**known, **series})


def data_file(root: Path, shard: str) -> Path:
    """The data file of a shard of this cache, whatever its backend."""
    return root / shard.partition("-")[0] / backend_of(backend_for(root)).data_file(shard)


def data_files(root: Path) -> list[Path]:
    """The data files of all committed shards of this cache."""
    return sorted(data_file(root, path.name.partition(".")[0]) for path in root.glob("*/*.index.jsonl"))


def latent_key(clip: int) -> str:
    return digest(["latent", clip])[:32]


def text_key(caption: int) -> str:
    return digest(["text", caption])[:32]


def entry(key: str, name: str = "moments") -> Entry:
    """An entry whose tensors and facts follow from its key; sizes differ where they may."""
    generator = torch.Generator().manual_seed(int(key[:8], 16))
    shape = (2, 3 + int(key[0], 16)) if BACKEND != "zarr" else (2, 9) if key in TEXT_KEYS else (2, 3, 1, 4)
    tensor = torch.randn(shape, generator=generator)
    return Entry(key, {name: tensor.to(torch.bfloat16)}, {"source": f"clip {key[:4]}", "times": [0.0, 0.125]})


LATENT_KEYS = [latent_key(clip) for clip in range(CLIPS)]
TEXT_KEYS = [text_key(caption) for caption in range(2)]


def sample(clip: int) -> SampleRecord:
    return SampleRecord(
        id=f"clip-{clip:03d}",
        source=f"clip {clip}.mp4",
        sha256=digest(["clip", clip]),
        window="start",
        caption="caption 1",
        frames=9,
        height=32,
        width=32,
        fps=8.0,
        latents=latent_key(clip),
        text=text_key(1),
    )


def fill(
    writer: CacheWriter, series: str, keys: Collection[str], done: Callable[[str], object] = str
) -> None:
    """Do every job there is; ``done`` is told each key after it is durable."""
    bad = latent_key(BAD)
    for job in writer.jobs(series, keys):
        with job:
            for key in job.remaining:
                if key == bad:
                    job.fail(key, "bad.mp4", "cannot be decoded")
                else:
                    job.append(entry(key))
                    done(key)
            job.finish()


def encode(root: Path, done: Callable[[str], object] = str) -> Manifest | None:
    """A whole run; None if other processes are not finished yet."""
    global BACKEND
    BACKEND = backend_for(root)  # a process of its own does not know it
    writer = CacheWriter.open(root, identity(root))
    writer.plan(LATENTS, LATENT_KEYS, CLIPS_PER_SHARD)
    writer.plan(TEXT, TEXT_KEYS, 100)
    fill(writer, LATENTS, LATENT_KEYS, done)
    fill(writer, TEXT, TEXT_KEYS, done)
    if writer.busy():
        return None
    failed = FailureRecord(id="bad", source="bad.mp4", window="start", reason="cannot be decoded")
    samples = [sample(clip) for clip in range(CLIPS) if clip != BAD]
    return writer.commit(samples, [failed], TEXT_KEYS[0])


def encode_until_idle(root: Path, done: Callable[[str], object] = str) -> None:
    """Body of one of several processes that fill the same cache."""
    while encode(root, done) is None:
        pass


def snapshot(root: Path) -> dict[str, bytes]:
    """All files of a cache by name, but for the journal, which holds times."""
    found = (path for path in root.rglob("*") if path.is_file() and path.name != "journal.jsonl")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


class Crash(BaseException):
    """Stands for the end of the process: nothing after it reaches the disk."""


class FakeOs:
    """Takes the place of ``os`` in :mod:`cogcache.cache.files`: counts, cuts and fails every change.

    Args:
        stop_at: Number of the step, from 0, that does not happen any more; nor does any later one.
        error: Fail with this errno at that step only, instead of the end.
        torn: Write half of the data before stopping.
        kill: Stop by a SIGKILL to this very process.
        tell: Called before every step.
    """

    STEPS = ("open", "write", "ftruncate", "fsync", "fdatasync", "replace", "unlink", "makedirs")

    def __init__(
        self,
        stop_at: int | None = None,
        error: int = 0,
        *,
        torn: bool = False,
        kill: bool = False,
        tell: Callable[[], object] = int,
    ) -> None:
        self.steps = 0
        self.log: list[str] = []
        self._stop_at, self._error, self._torn, self._kill = stop_at, error, torn, kill
        self._tell = tell

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.STEPS:
            return real

        def step(*args: Any, **kwargs: Any) -> Any:
            number, self.steps = self.steps, self.steps + 1
            self.log.append(name)
            self._tell()
            if (
                self._stop_at is not None
                and number >= self._stop_at
                and (number == self._stop_at or not self._error)
            ):
                if name == "write" and self._torn and number == self._stop_at:
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                if self._kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(self._error, os.strerror(self._error)) if self._error else Crash
            return None if name in ("fsync", "fdatasync") else real(*args, **kwargs)

        return step


class PowerOs(FakeOs):
    """Knows what a power cut would take: files and folders that were changed and not synced since."""

    def __init__(self) -> None:
        super().__init__()
        self.dirty: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self, f"_{name}") if name in self.STEPS else getattr(os, name)

    @staticmethod
    def _name(fd: int) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink())

    def _open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        passing = path.name == ".lock" or path.suffix in (".lock", ".tmp")
        if flags & os.O_CREAT and not passing and not path.exists():
            self.dirty.add(str(path.parent))
        return os.open(path, flags, mode)

    def _write(self, fd: int, data: bytes) -> int:
        self.dirty.add(self._name(fd))
        return os.write(fd, data)

    def _fsync(self, fd: int) -> None:
        self.dirty.discard(self._name(fd))

    _fdatasync = _fsync

    @staticmethod
    def _ftruncate(fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def _replace(self, source: Path, target: Path) -> None:
        self.log.append(target.name)
        assert str(source) not in self.dirty
        if target.name.endswith(
            ("index.jsonl", "manifest.json")
        ):  # what it vouches for must be there before it
            assert not self.dirty
        source.replace(target)
        self.dirty.add(str(target.parent))

    def _unlink(self, path: Path) -> None:
        path.unlink()
        self.dirty.add(str(path.parent))

    def _makedirs(self, path: Path, exist_ok: bool) -> None:
        self.dirty |= {str(p.parent) for p in (path, *path.parents) if not p.exists()}
        path.mkdir(parents=True, exist_ok=exist_ok)


def install(fake: FakeOs, monkeypatch: Any) -> FakeOs:
    """Let the cache write through ``fake`` from now on."""
    monkeypatch.setattr(files, "os", fake)
    return fake
