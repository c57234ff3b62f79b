"""What decides the memory and the time of a training step, counted from a transformer's layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cogcache.allocator import locked_size
from cogcache.geometry import Bucket
from cogcache.int8 import int8_size
from cogcache.variants import Variant

__all__ = ["Workload", "workload_of"]


@dataclass(frozen=True)
class Workload:
    """What decides the memory of a step. Bytes, but for ``layers``.

    Attributes:
        blocks: Frozen weights of all blocks.
        int8: The same with their matrices in 8 bits.
        others: Frozen weights and buffers outside of the blocks.
        trained: Trained parameters in float32.
        unit: One block's tokens [B, L + S, dim] in the dtype that is computed in.
        logsumexp: Attention's log-sum-exp of one block, float32 [B, H, L + S].
        text: The part of ``unit`` that is text.
        low: What is between A and B of all LoRAs of one block, [B, L + S, rank] each.
        wide: Inputs of one block's LoRAs outside of attention.
        dora: What goes through one block's layers with DoRA, the mean of inputs and outputs.
        cast: One block's weights in the dtype that is computed in, where they are held in another.
        locked: Trained parameters in page-locked host memory, each by itself.
    """

    layers: int
    blocks: int
    int8: int
    others: int
    trained: int
    unit: int
    logsumexp: int
    text: int = 0
    low: int = 0
    wide: int = 0
    dora: int = 0
    cast: int = 0
    locked: int = 0


def workload_of(
    transformer: Any,
    variant: Variant,
    buckets: Sequence[Bucket],
    batch_size: int,
    compute: torch.dtype | None = None,
) -> Workload:
    """The workload of the largest bucket.

    Args:
        transformer: Holds what is trained; may lie on the meta device.
        compute: What it computes in, under autocast if need be. Default: the dtype of the blocks' weights.
    """
    tokens = max(variant.video_tokens(b.frames, b.size) for b in buckets) + variant.text_length
    blocks: nn.ModuleList = transformer.transformer_blocks
    frozen = [p for p in blocks.parameters() if not p.requires_grad]
    trained = [p for p in transformer.parameters() if p.requires_grad]
    held = next(blocks.parameters()).dtype
    compute = compute or held
    rows, dim = batch_size * tokens, variant.num_attention_heads * variant.attention_head_dim
    weights = _bytes(frozen) + _bytes(p for p in trained if len(frozen) == 0)
    ranks, wide, dora = _lora_widths(blocks[0])
    return Workload(
        layers=len(blocks),
        blocks=_bytes(frozen),
        int8=sum(sum(int8_size(p)) if p.ndim == 2 else _bytes([p]) for p in frozen),
        others=_bytes([*transformer.parameters(), *transformer.buffers()]) - _bytes(frozen) - _bytes(trained),
        trained=sum(4 * p.numel() for p in trained),
        unit=rows * dim * compute.itemsize,
        logsumexp=rows * variant.num_attention_heads * 4,
        text=batch_size * variant.text_length * dim * compute.itemsize,
        low=rows * ranks * compute.itemsize,
        wide=rows * wide * compute.itemsize,
        dora=rows * dora * compute.itemsize,
        cast=0 if compute == held else weights // len(blocks) * compute.itemsize // held.itemsize,
        locked=sum(locked_size(4 * p.numel()) for p in trained),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _lora_widths(block: nn.Module) -> tuple[int, int, int]:
    """Sums over a block: the ranks; the widths of inputs of LoRAs outside of attention; those of layers with DoRA."""
    ranks = wide = dora = 0
    for name, module in block.named_modules():
        for adapter, lora in getattr(module, "lora_A", {}).items():
            ranks += lora.out_features
            wide += lora.in_features if name.startswith("ff.") else 0
            if adapter in getattr(module, "lora_magnitude_vector", {}):
                dora += (lora.in_features + module.lora_B[adapter].out_features) // 2
    return ranks, wide, dora
