"""How long a training step takes, before it is run.

Matrix products and attention are divided by what they reach inside a step; the rest (norms, rotary positions, GELU,
sums, and the LoRA's casts in eager blocks) is bound by memory and counted in passes over one block's tokens. Copies
from and to the host run beside all that: a pass takes as long as the longer of the two.

The constants were fitted on an H200 to 5B at 49x480x720 (``benchmarks/records/2026-11-22-tiers.md``). On other GPUs,
times are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

from cogcache.train.flops import Flops, StepFlops
from cogcache.train.memory.measures import Measures
from cogcache.train.memory.workload import Workload

__all__ = ["Rates", "microbatch_seconds", "update_seconds"]


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches inside a training step.

    Attributes:
        linear: Matrix products, operations a second.
        attention: Attention, operations a second, forward and backward together.
        memory: Bytes a second of elementwise work.
        link: Bytes a second from and to page-locked host memory, each way.
        source: Where these are from, for people.
    """

    linear: float
    attention: float
    memory: float
    link: float
    source: str = ""


@dataclass(frozen=True)
class _Passes:
    forward: float
    backward: float


_COMPILED, _EAGER = _Passes(73, 63), _Passes(338, 292)
"""Passes over a block's tokens. What is computed again counts as another forward pass."""
_PLAIN_COMPILED = _Passes(102, 88)
"""diffusers' own blocks compiled, fully checkpointed (``benchmarks/records/2026-11-29-one-gpu.md``): 292 of the eager
blocks' 968 passes, dealt as those are. Taken for full training and without checkpointing, too, where it was not
measured.
"""
_AGAIN_PASSES = 25
"""What more is made twice where a block's work is done in parts (``benchmarks/records/2026-11-30-one-gpu.md``)."""
_UPDATE_PASSES = 12
"""Clipping and AdamW, over the trained parameters."""


def microbatch_seconds(
    load: Workload,
    flops: StepFlops,
    measures: Measures | None,
    rates: Rates,
    *,
    checkpointing: bool = True,
    compiled: bool = False,
) -> float:
    """One forward and backward pass.

    Args:
        load: Of the same microbatch as ``flops``.
        measures: None for diffusers' own blocks, with ``checkpointing`` or without, ``compiled`` or not.
    """
    how = measures or Measures(recompute=checkpointing, compile=compiled)
    passes = (_COMPILED if measures else _PLAIN_COMPILED) if how.compile else _EAGER
    stored = load.int8 if how.storage == "int8" else load.blocks
    weights = stored if how.weights == "host" else 0
    kept = load.layers * load.unit * ((how.inputs == "host") + (how.attention == "host"))
    again = passes.forward * how.recompute + _AGAIN_PASSES * how.in_parts
    forward = _computing(load, flops.forward, passes.forward, rates)
    backward = _computing(load, flops.backward + flops.recomputed, passes.backward + again, rates)
    return max(forward, weights / rates.link, kept / rates.link) + max(
        backward, (weights + kept) / rates.link
    )


def _computing(load: Workload, flops: Flops, passes: float, rates: Rates) -> float:
    moved = passes * load.unit * load.layers
    return flops.linear / rates.linear + flops.attention / rates.attention + moved / rates.memory


def update_seconds(load: Workload, measures: Measures | None, rates: Rates) -> float:
    """Clipping and the optimizer's step."""
    travelling = 4 * load.trained if measures is not None and measures.optimizer == "host" else 0
    return _UPDATE_PASSES * load.trained / rates.memory + travelling / rates.link
