"""The reference recipe: each clip is decoded, encoded and written before the next one is looked at.

As published trainers precompute: decord with its own threads and its own resizing, the VAE in tiles and slices at
batch 1 through stock diffusers, one file per clip; T5 with one caption at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from cogcache.geometry import Bucket, Size, plan_fit

__all__ = ["encode_in_line", "load_stock_vae", "read_in_line"]


def load_stock_vae(root: Path, dtype: torch.dtype, device: torch.device, *, tiled: bool) -> Any:
    """``AutoencoderKLCogVideoX`` as it is; in slices, and in tiles where asked."""
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(root / "vae", torch_dtype=dtype, use_safetensors=True)
    vae.enable_slicing()
    if tiled:
        vae.enable_tiling()
    return vae.eval().requires_grad_(False).to(device)


def read_in_line(path: Path, bucket: Bucket, fps: float) -> torch.Tensor:
    """Frames ``[F, H, W, 3]``, uint8, at ``fps`` from the start of a video, covering the bucket's size."""
    import decord

    probe = decord.VideoReader(str(path), num_threads=1)
    height, width = probe[0].shape[:2]
    plan = plan_fit(Size(height, width), bucket.size, "cover")
    video = decord.VideoReader(str(path), width=plan.resized.width, height=plan.resized.height)
    step = video.get_avg_fps() / fps
    last = len(video) - 1
    picked = [min(last, int(number * step)) for number in range(bucket.frames)]
    frames = np.asarray(video.get_batch(picked).asnumpy())
    top, left = plan.top, plan.left
    return torch.from_numpy(frames[:, top : top + bucket.height, left : left + bucket.width].copy())


@torch.inference_mode()
def encode_in_line(
    vae: Any, paths: Sequence[Path], bucket: Bucket, fps: float, out: Path, device: torch.device
) -> tuple[float, float]:
    """Encode videos one after the other into files in ``out``: seconds, and those of them on the GPU."""
    out.mkdir(parents=True, exist_ok=True)
    busy_s, started = 0.0, time.perf_counter()
    for number, path in enumerate(paths):
        frames = read_in_line(path, bucket, fps)
        pixels = frames.float().div(255).mul(2).sub(1).permute(3, 0, 1, 2)[None].contiguous()
        inputs = pixels.to(device, vae.dtype)
        spent = time.perf_counter()
        latents = vae.encode(inputs).latent_dist.sample().cpu()  # which waits for the GPU
        busy_s += time.perf_counter() - spent
        save_file({"latents": latents}, out / f"{number}.safetensors")
    return time.perf_counter() - started, busy_s
