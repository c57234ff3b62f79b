"""Transformers of real size with random weights: speed and memory do not depend on what the weights are."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cogcache.tiny import Family, build_tiny_model
from cogcache.variants import Variant, read_variant

__all__ = ["real_config", "real_transformer"]

_FIELDS = ("num_layers", "num_attention_heads", "sample_frames", "sample_height", "sample_width")
_SIZES: dict[Family, tuple[int, ...]] = {
    "2b": (30, 30, 49, 60, 90),
    "5b": (42, 48, 49, 60, 90),
    "5b-i2v": (42, 48, 49, 60, 90),
    "1.5-5b": (42, 48, 81, 300, 300),
    "1.5-5b-i2v": (42, 48, 81, 96, 170),
}
"""Of the published ``transformer/config.json`` files."""
_WIDE = {"attention_head_dim": 64, "time_embed_dim": 512, "text_embed_dim": 4096}


def real_config(family: Family, tiny: dict[str, Any]) -> dict[str, Any]:
    """The config of a family's tiny transformer, made as large as the published one."""
    ofs = {"ofs_embed_dim": 512} if tiny.get("ofs_embed_dim") else {}
    return tiny | _WIDE | dict(zip(_FIELDS, _SIZES[family], strict=True)) | ofs


def real_transformer(family: Family, dtype: torch.dtype, device: torch.device) -> tuple[Any, Variant]:
    """A frozen transformer on ``device``, and its facts."""
    from diffusers import CogVideoXTransformer3DModel

    with TemporaryDirectory() as folder:
        root = Path(folder) / "model"
        build_tiny_model(root, family)
        file = root / "transformer" / "config.json"
        config = real_config(family, json.loads(file.read_text("utf-8")))
        file.write_text(json.dumps(config), "utf-8")
        variant = read_variant(root)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = CogVideoXTransformer3DModel.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return transformer.requires_grad_(False).train(), variant
