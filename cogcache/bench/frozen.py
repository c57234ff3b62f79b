"""Frozen encoders of real size with random weights: speed and memory do not depend on what the weights are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from cogcache.models import torch_dtype
from cogcache.precompute.text import FrozenText
from cogcache.quiet import quiet_libraries
from cogcache.tiny import build_tiny_model
from cogcache.tiny.weights import randomise, tune_vae

__all__ = ["model_folder", "real_text"]

REAL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 256, 512),
    "layers_per_block": 3,
    "norm_num_groups": 32,
    "sample_height": 480,
    "sample_width": 720,
}
"""Of the published ``vae/config.json`` files, where the tiny one's differs."""

REAL_TEXT: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}
"""Of ``google/t5-v1_1-xxl``."""


def model_folder(root: Path) -> Path:
    """A tiny CogVideoX-5B checkpoint whose VAE has its real size; 0.4 GB in bfloat16."""
    from diffusers import AutoencoderKLCogVideoX

    build_tiny_model(root, "5b", dtype="bfloat16")
    file = root / "vae" / "config.json"
    config = json.loads(file.read_text("utf-8")) | REAL_VAE
    with torch.random.fork_rng(devices=[]):
        vae = AutoencoderKLCogVideoX.from_config(config)
    randomise(vae, "bench", "vae")
    tune_vae(vae)
    shutil.rmtree(root / "vae")
    with quiet_libraries():
        torch.nn.Module.to(vae, torch.bfloat16).save_pretrained(root / "vae")
    return root


def real_text(
    root: Path, dtype: str, length: int, device: torch.device, *, offloaded: bool = False
) -> FrozenText:
    """A T5 encoder of real size for ``device``, with the tokenizer of the checkpoint in ``root``."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    tiny = json.loads((root / "text_encoder" / "config.json").read_text("utf-8"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype(dtype))
    try:
        with device, quiet_libraries():
            model = T5EncoderModel(T5Config(**tiny | REAL_TEXT))
    finally:
        torch.set_default_dtype(before)
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
    model.eval().requires_grad_(False)
    return FrozenText.around(model, tokenizer, length, device, offloaded=offloaded)
