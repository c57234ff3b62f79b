"""``cogcache bench encode``: encoding of videos and captions beside the reference recipe, in one process.

- ``reference``: :mod:`cogcache.bench.in_line`.
- ``untiled`` and ``tiled``: ``encode`` itself, from video files to a committed cache, with a VAE that is loaded and
  compiled before. Clips per second count from the first file opened to the last entry written.

The VAE has its real size and random weights. T5 is measured by itself, in memory. GPU busy is the time between GPU
events around the work on each clip, as a share of the same seconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cogcache.bench.in_line import encode_in_line, load_stock_vae, read_in_line
from cogcache.cache.format import LATENTS
from cogcache.config import EncodeConfig
from cogcache.geometry import Bucket
from cogcache.models import torch_dtype
from cogcache.precompute.encode import encode_all
from cogcache.precompute.lane import Running
from cogcache.precompute.text import FrozenText
from cogcache.precompute.vae import FrozenVae, to_pixels

__all__ = ["Accuracy", "ClipRow", "Job", "TextRow", "accuracy", "our_row", "reference_row", "text_rows"]


@dataclass(frozen=True)
class Job:
    """What is encoded, and where.

    Attributes:
        root: Checkpoint folder.
        data_root: Videos with captions.
        work: Folder for caches and files; emptied by the caller.
    """

    root: Path
    data_root: Path
    work: Path
    bucket: Bucket
    device: torch.device
    fps: float
    workers: int | None = None
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class ClipRow:
    """How fast clips were encoded. Shares are of ``seconds``; memory is that of the GPU at its peak.

    Attributes:
        warm_up_s: The first clip, compilation included; it is not counted.
        waiting: Share in which the GPU had nothing to do because no video was read yet.
    """

    recipe: str
    clips: int
    seconds: float
    clips_per_s: float
    gpu_busy: float
    waiting: float | None
    peak_gib: float
    warm_up_s: float


@dataclass(frozen=True)
class TextRow:
    """How fast captions were embedded."""

    recipe: str
    captions: int
    prompts_per_s: float
    peak_gib: float


@dataclass(frozen=True)
class Accuracy:
    """Relative error of latent means (root mean square) against diffusers' VAE in float32, in no tiles."""

    encoder: str
    error: float


def reference_row(job: Job, paths: Sequence[Path]) -> ClipRow:
    """The reference recipe over ``paths``, after one clip that is not counted."""
    vae = load_stock_vae(job.root, torch_dtype(job.dtype), job.device, tiled=True)
    warm_up_s, _ = encode_in_line(vae, paths[:1], job.bucket, job.fps, job.work / "files", job.device)
    _reset_peak(job.device)
    seconds, busy_s = encode_in_line(vae, paths, job.bucket, job.fps, job.work / "files", job.device)
    rate, busy = len(paths) / seconds, busy_s / seconds
    return ClipRow("reference", len(paths), seconds, rate, busy, None, _peak(job.device), warm_up_s)


def our_row(job: Job, *, tiled: bool) -> ClipRow:
    """``encode`` over the data root, with a VAE that has seen one clip.

    Raises:
        CogcacheError: as ``encode``.
    """
    vae = FrozenVae(job.root, job.dtype, tiled=tiled, device=job.device)
    started = time.perf_counter()
    vae.encode(torch.zeros(1, job.bucket.frames, job.bucket.height, job.bucket.width, 3, dtype=torch.uint8))
    warm_up_s, busy_before = time.perf_counter() - started, vae.busy_s
    _reset_peak(job.device)
    name = "tiled" if tiled else "untiled"
    result = encode_all(_config(job, job.work / name, tiled=tiled), lambda _: vae)
    spent = result.spent[LATENTS]
    return ClipRow(
        name,
        result.encoded,
        spent.seconds,
        result.encoded / spent.seconds,
        (vae.busy_s - busy_before) / spent.seconds,
        spent.waited_s / spent.seconds,
        _peak(job.device),
        warm_up_s,
    )


def _config(job: Job, shards: Path, *, tiled: bool) -> EncodeConfig:
    return EncodeConfig(
        data_root=job.data_root,
        model=str(job.root),
        shards=shards,
        bucket=[str(job.bucket)],
        fps=str(job.fps),
        vae_dtype=job.dtype,
        tiling="on" if tiled else "off",
        device=str(job.device),
        workers=job.workers,
        format="webdataset",
    )


def text_rows(
    text: FrozenText, device: torch.device, captions: int, sizes: Mapping[str, int]
) -> Iterator[TextRow]:
    """Captions in batches of each of ``sizes``, by the name of the row; no more than 64 one at a time.

    As ``encode`` does it, the next batch is begun before the last one's result is read; one at a time, as the reference
    does it, it is not.
    """
    texts = [
        f"A camera glides over hills and rivers, picture {number}, in warm light."
        for number in range(captions)
    ]
    for name, size in sizes.items():
        count = min(captions, 64) if size == 1 else captions
        text.encode(texts[:size])
        _reset_peak(device)
        started, running = time.perf_counter(), deque[Running]()
        for start in range(0, count, size):
            running.append(text.start(texts[start : min(count, start + size)]))
            while len(running) > int(size > 1):
                running.popleft().result()
        for last in running:
            last.result()
        yield TextRow(name, count, count / (time.perf_counter() - started), _peak(device))


def accuracy(job: Job, path: Path) -> Iterator[Accuracy]:
    """Each way of encoding one clip, beside diffusers in float32."""
    frames = read_in_line(path, job.bucket, job.fps)[None]
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = _stock_mean(job, frames, torch.float32, tiled=False)
    for name, tiled in (("diffusers bfloat16", False), ("diffusers bfloat16, tiled", True)):
        yield Accuracy(name, _error(_stock_mean(job, frames, torch.bfloat16, tiled=tiled), exact))
    for dtype, tiled in (("bfloat16", False), ("float16", False), ("bfloat16", True)):
        vae = FrozenVae(job.root, dtype, tiled=tiled, device=job.device)
        mean = vae.encode(frames).float().chunk(2, 1)[0]
        yield Accuracy(f"ours {dtype}" + (", tiled" if tiled else ""), _error(mean, exact))


@torch.inference_mode()
def _stock_mean(job: Job, frames: torch.Tensor, dtype: torch.dtype, *, tiled: bool) -> torch.Tensor:
    vae = load_stock_vae(job.root, dtype, job.device, tiled=tiled)
    mean: torch.Tensor = vae.encode(to_pixels(frames).to(job.device, dtype)).latent_dist.mean
    return mean.float().cpu()


def _error(mean: torch.Tensor, exact: torch.Tensor) -> float:
    return float((mean - exact).norm() / exact.norm())


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
