"""How much memory a training step takes under given measures, before it is run.

Everything that is kept is counted from shapes. What a block needs while it is at work was measured on an H200 (5B at
49x480x720, compiled; ``benchmarks/records/2026-11-22-tiers.md``) and is counted in units of one block's video and text
tokens [B, L + S, dim] in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cogcache.geometry import Bucket
from cogcache.train.memory.measures import Measures
from cogcache.variants import Variant

__all__ = ["Need", "Workload", "estimate", "workload_of"]

_WORK_UNITS = 13.3
"""A block's backward pass with recomputation: mostly the feed-forward's inner activation, four units wide."""
_INPUT_UNITS, _ATTENTION_UNITS = 2.0, 5.2
"""What is on its way to or from the host, added to it."""
_KEPT_UNITS = 14.4
"""What a block's forward pass keeps where nothing is recomputed."""
_SLOTS = 2


@dataclass(frozen=True)
class Workload:
    """What decides the memory of a step. Bytes, but for ``layers`` and the two numbers of a token.

    Attributes:
        blocks: Frozen weights of all blocks.
        others: Weights outside of the blocks.
        trained: Trained parameters in float32.
        unit: One block's tokens [B, L + S, dim] in the base's dtype.
        logsumexp: Attention's log-sum-exp of one block, float32 [B, H, L + S].
    """

    layers: int
    blocks: int
    others: int
    trained: int
    unit: int
    logsumexp: int


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of a step, on the device and page-locked on the host."""

    device: int
    host: int


def workload_of(transformer: Any, variant: Variant, buckets: Sequence[Bucket], batch_size: int) -> Workload:
    """The workload of the largest bucket. ``transformer`` holds what is trained."""
    tokens = max(variant.video_tokens(b.frames, b.size) for b in buckets) + variant.text_length
    dim = variant.num_attention_heads * variant.attention_head_dim
    blocks: nn.ModuleList = transformer.transformer_blocks
    frozen = [p for p in blocks.parameters() if not p.requires_grad]
    trained = [p for p in transformer.parameters() if p.requires_grad]
    everything = [*transformer.parameters(), *transformer.buffers()]
    total = sum(t.numel() * t.element_size() for t in everything)
    blocks_bytes = sum(p.numel() * p.element_size() for p in frozen)
    trained_bytes = sum(p.numel() * 4 for p in trained)
    return Workload(
        layers=len(blocks),
        blocks=blocks_bytes,
        others=total - blocks_bytes - sum(p.numel() * p.element_size() for p in trained),
        trained=trained_bytes,
        unit=batch_size * tokens * dim * frozen[0].element_size(),
        logsumexp=batch_size * tokens * variant.num_attention_heads * 4,
    )


def estimate(load: Workload, measures: Measures) -> Need:
    """Peak of one step."""
    device, host = load.others + 2 * load.trained, 0
    if measures.weights == "host":
        device += _SLOTS * load.blocks // load.layers
        host += load.blocks
    else:
        device += load.blocks
    if measures.optimizer == "host":
        host += 2 * load.trained
    else:
        device += 2 * load.trained
    if not measures.recompute:
        return Need(device + int(_KEPT_UNITS * load.unit * load.layers), host)
    work = _WORK_UNITS
    if measures.inputs == "host":
        work += _INPUT_UNITS
        host += load.layers * load.unit
    else:
        device += load.layers * load.unit
    if measures.attention is not None:
        device += load.layers * load.logsumexp
    if measures.attention == "host":
        work += _ATTENTION_UNITS
        host += load.layers * load.unit
    elif measures.attention == "device":
        device += load.layers * load.unit
    return Need(device + int(work * load.unit), host)
