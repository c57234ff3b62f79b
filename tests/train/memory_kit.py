"""Tiny transformers with a LoRA that is not zero, and what they give for a few microbatches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogcache.config import TrainConfig
from cogcache.int8 import Int8, quantize
from cogcache.tiny import Family
from cogcache.train.model import add_lora, load_scheduler, load_transformer, trainable
from cogcache.train.objective import loss_per_sample, padded_frames
from cogcache.variants import read_variant

CPU = torch.device("cpu")
FAMILIES: list[Family] = ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [
    *ATTENTION,
    "ff.net.0.proj",
    "ff.net.2",
    "norm1.linear",
    "norm2.linear",
    "time_embedding.linear_1",
]
CASES: list[tuple[Family, list[str]]] = [
    *((family, ATTENTION) for family in FAMILIES),
    ("5b", EVERYWHERE),
    ("1.5-5b-i2v", EVERYWHERE),
]
"""Families and what their LoRA is on."""
CASE_NAMES = [*FAMILIES, "5b everywhere", "1.5-5b-i2v everywhere"]


def with_lora(
    root: Path,
    targets: list[str],
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
) -> Any:
    """A transformer with a LoRA whose B is not zero, else no gradient would reach A.

    Args:
        dtype: What the base computes in.
        stored: What its weights are rounded to before that, if not ``dtype``.
    """
    transformer = load_transformer(root, stored or dtype)
    nn.Module.to(transformer, dtype)
    add_lora(transformer, TrainConfig(shards=Path("unused"), rank=3, alpha=2.0, target_modules=targets))
    for number, (name, parameter) in enumerate(trainable(transformer).items()):
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    return transformer


def values_in(found: Int8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a matrix in 8 bits, flat."""
    out = torch.empty(found.steps.numel(), dtype=dtype, device=found.steps.device)
    found.read(out)
    return out


def rounded(transformer: Any, dtype: torch.dtype | None = None) -> Any:
    """The same model with its blocks' matrices rounded to 8 bits, and held as ever.

    Args:
        dtype: What the values are made in of the 8 bits. Default: what they are held in.
    """
    for parameter in transformer.transformer_blocks.parameters():
        if not parameter.requires_grad and parameter.ndim == 2:
            made = values_in(quantize(parameter.data), dtype or parameter.dtype)
            parameter.data = made.to(parameter.dtype).view(parameter.shape)
    return transformer


def losses(transformer: Any, root: Path, steps: int) -> Iterator[Tensor]:
    """Losses [2] of some microbatches, on the transformer's device.

    What is drawn is float32, from the CPU, and the same for every transformer.
    """
    variant, scheduler, device = read_variant(root), load_scheduler(root), transformer.device
    shape = variant.latent_shape(variant.sample_frames, variant.default_size)
    c, f, h, w = shape
    for step in range(steps):
        source = torch.Generator().manual_seed(step)

        def normal(*shape: int, source: torch.Generator = source) -> Tensor:
            return torch.randn(shape, generator=source).to(device)

        yield loss_per_sample(
            transformer,
            scheduler,
            normal(2, 2 * c, f, h, w),
            normal(2, variant.text_length, variant.text_dim),
            noise_bpchw=normal(2, padded_frames(f, variant.patch_size_t), c, h, w),
            timesteps_b=torch.tensor([(100 + 37 * step) % 1000, 900], device=device),
            variant=variant,
            posterior_noise_bcfhw=normal(2, c, f, h, w),
            image_latents_bcfhw=normal(2, c, 1, h, w) if variant.task == "i2v" else None,
        )


def gradients(transformer: Any, root: Path, steps: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of some microbatches, and their gradients added up."""
    found = []
    for loss_b in losses(transformer, root, steps):
        loss_b.sum().backward()
        found.append(loss_b.detach())
    return found, {name: p.grad for name, p in trainable(transformer).items() if p.grad is not None}
