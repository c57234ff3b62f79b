"""What a stock pipeline makes of one prompt, for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogcache.geometry import Size


def stock(pipe: Any, size: Size, lora: Path | None = None, steps: int = 2, **inputs: Any) -> np.ndarray:
    """Frames [F, H, W, 3], uint8, of a pipeline with its LoRA, by seed 5."""
    if lora:
        pipe.load_lora_weights(lora)
    result = pipe(
        prompt="a rabbit",
        negative_prompt="",
        height=size.height,
        width=size.width,
        num_inference_steps=steps,
        guidance_scale=6.0,
        max_sequence_length=pipe.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
        **inputs,
    ).frames[0]
    return (result * 255).round().astype(np.uint8)
