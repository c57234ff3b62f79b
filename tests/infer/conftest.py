"""LoRA files for the tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogcache.lora import Provenance, save_lora
from cogcache.tiny import Family
from cogcache.variants import read_variant

MakeLora = Callable[..., Path]


@pytest.fixture
def make_lora(tiny_models: Callable[[Family], Path], tmp_path: Path) -> MakeLora:
    """Write a LoRA of rank 4 with strong random weights for the tiny model of ``family``.

    It was trained on clips of 9 frames of 32x48 at 12 fps, so it says; ``known`` changes what it says.
    """

    def make(
        family: Family = "2b",
        alpha: float = 2,
        name: str = "lora.safetensors",
        dora: bool = False,
        **known: Any,
    ) -> Path:
        root = tiny_models(family)
        variant = read_variant(root)
        width = variant.num_attention_heads * variant.attention_head_dim
        generator = torch.Generator().manual_seed(3)
        tensors = {
            f"transformer_blocks.{layer}.attn1.{module}.lora_{part}.weight": 0.3
            * torch.randn((4, width) if part == "A" else (width, 4), generator=generator)
            for layer in range(variant.num_layers)
            for module in ("to_q", "to_v")
            for part in "AB"
        }
        said = {"base_model": str(root), "variant": variant, "frames": 9, "size": "32x48", "fps": 12, **known}
        config = {"r": 4, "lora_alpha": alpha, "target_modules": {"to_q", "to_v"}, "use_dora": dora}
        if dora:
            for name_a in [key for key in tensors if "lora_A" in key]:
                tensors[name_a.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(width)
        return save_lora(tmp_path / name, tensors, lora_config=config, provenance=Provenance(**said))

    return make
