"""How much memory a training step takes under given measures, before it is run.

Weights, gradients, optimizer state and all that is kept from the forward to the backward pass are counted from shapes.
What a block needs while it is at work is counted in units of its video and text tokens [B, L + S, dim] in the dtype
that is computed in: by following every allocation of the eager blocks on a CPU, and for compiled ones from measured
peaks (H200, 5B at 49x480x720; ``benchmarks/records/2026-11-22-tiers.md``).

A step has three moments at which memory can peak: the backward pass as it begins (everything kept, no gradients yet),
as it ends (nothing kept, all gradients), and the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cogcache.allocator import locked_size, pool_size, slab_counts, slabs_size
from cogcache.train.memory.measures import Measures
from cogcache.train.memory.workload import Workload
from cogcache.train.weights import STAGED

__all__ = ["Estimate", "Need", "estimate"]

_SLOTS = 2
_CHUNK = 4 * (64 << 20)
"""What the update of an optimizer on the host has on the device at once: values, moments and a temporary."""


@dataclass(frozen=True)
class _Work:
    """What is at work in one block's backward pass, in units of its tokens: base, and for each byte of LoRA input
    outside of attention, and of what goes through layers with DoRA.
    """

    base: float
    wide: float
    dora: float


_COMPILED, _EAGER = _Work(17.6, 1.8, 4.5), _Work(21.6, 1.8, 4.5)
"""Blocks cut at their attention, whose output was kept."""
_SPARED_UNITS = 4.5
"""What is less of that where a block's work is done in parts (``benchmarks/records/2026-11-30-one-gpu.md``)."""
_HEADS_UNITS, _HEADS_IN_PARTS_UNITS = 5.0, 3.6
"""Query, key and value and what made them, alive all the while where attention itself is computed again."""
_TRAVEL_UNITS = 2.0
"""Of each kind that is kept on the host: one tensor in use and one that arrives."""
_KEEP_ALL = _Work(8.3, 1.2, 4.7)
_KEPT_UNITS = 13.1
"""What each block's forward pass keeps where nothing is computed again."""
_PLAIN, _AUTOCAST = _Work(28.5, 2.6, 4.0), _Work(30.0, 2.6, 4.0)
"""diffusers' own blocks with PEFT's float32 products; the same under autocast."""
_PLAIN_COMPILED = _Work(25.3, 2.6, 4.0)
"""Those blocks compiled, fully checkpointed. What compiling saves under autocast or without checkpointing was not
measured: there the eager blocks' figures stand, as bounds."""
_PLAIN_KEPT_UNITS = 28.0
"""As ``_KEPT_UNITS`` for them: without checkpointing."""


@dataclass(frozen=True)
class Need:
    """Bytes on the device and on the host."""

    device: int
    host: int


@dataclass(frozen=True)
class Estimate:
    """Peak of a step by component, bytes; on the host all of it is page-locked.

    Attributes:
        loading: Host memory while the weights are read.
    """

    device_parts: Mapping[str, int]
    host_parts: Mapping[str, int] = field(default_factory=dict)
    loading: int = 0

    @property
    def device(self) -> int:
        """Sum of the parts."""
        return sum(self.device_parts.values())

    @property
    def host(self) -> int:
        """Sum of the page-locked parts."""
        return sum(self.host_parts.values())


def estimate(
    load: Workload,
    measures: Measures | None,
    *,
    checkpointing: bool = True,
    compiled: bool = False,
    gradients_stay: bool = False,
) -> Estimate:
    """Peak of one step.

    Args:
        measures: None for diffusers' own blocks.
        checkpointing: Whether those checkpoint.
        compiled: Whether those are compiled.
        gradients_stay: Whether gradients are there as the backward pass begins: with several microbatches a step,
            or several processes.
    """
    how = measures or Measures(recompute=checkpointing, compile=compiled)
    fixed = _fixed(load, how)
    gradients, kept = load.trained, _kept(load, how, own=measures is not None)
    working = _working(load, how, own=measures is not None)
    begin = {**fixed, "gradients": gradients * gradients_stay, **kept, "working_set": working}
    end = {**fixed, "gradients": gradients, "working_set": working}
    temporary = _CHUNK if how.optimizer == "host" else load.trained
    update = {**fixed, "gradients": gradients, "working_set": min(temporary, load.trained)}
    peak = max((begin, end, update), key=lambda parts: sum(parts.values()))
    every = dict.fromkeys([*fixed, "gradients", *_KEPT, "working_set"], 0)
    return Estimate({**every, **peak}, _host(load, how), _loading(load, how))


def _loading(load: Workload, how: Measures) -> int:
    """On the host while weights are read: all of them where blocks stay there, and for DoRA, whose first magnitudes are
    made of them. They are put into page-locked memory slab by slab."""
    if how.storage == "int8":
        kept = load.int8 if how.weights == "host" else 0
        return kept + STAGED + _first_slab(load, how) * (how.weights == "host")
    if how.weights == "host" or load.dora:
        return load.blocks + load.others + load.trained + _first_slab(load, how)
    return STAGED


def _first_slab(load: Workload, how: Measures) -> int:
    size = _stored(load, how) // load.layers
    return locked_size(slab_counts(size, load.layers)[0] * size)


def _stored(load: Workload, how: Measures) -> int:
    """The blocks' frozen weights, wherever they are kept."""
    return load.int8 if how.storage == "int8" else load.blocks


_KEPT = ("block_inputs", "attention_outputs", "activations")


def _fixed(load: Workload, how: Measures) -> dict[str, int]:
    """What is on the device all the time."""
    weights = _SLOTS * load.blocks // load.layers if how.streams else 0
    if how.weights == "device":
        weights += _stored(load, how)
    elif how.storage == "int8":
        weights += load.int8 // load.layers  # a block's buffer as it arrives
    return {
        "frozen_weights": weights,
        "trained_weights": load.trained,
        "others": load.others,
        "optimizer_state": 0 if how.optimizer == "host" else 2 * load.trained,
    }


def _kept(load: Workload, how: Measures, *, own: bool) -> dict[str, int]:
    """What the forward pass leaves on the device for the backward pass."""
    if not how.recompute:
        units = _KEPT_UNITS if own else _PLAIN_KEPT_UNITS
        each = (
            units * load.unit
            + load.logsumexp
            + load.low
            + _KEEP_ALL.wide * load.wide
            + _KEEP_ALL.dora * load.dora
        )
        casts = max(load.trained // 2, load.layers * load.cast)
        return {"activations": int(load.layers * each) + casts}
    parts = {"block_inputs": load.layers * (load.text if how.inputs == "host" else load.unit)}
    if how.attention is not None:
        outputs = load.unit if how.attention == "device" else 0
        parts["attention_outputs"] = load.layers * (outputs + load.logsumexp)
    return parts


def _working(load: Workload, how: Measures, *, own: bool) -> int:
    """One block at work in the backward pass, and what travels meanwhile."""
    if not own:
        saves = how.compile and how.recompute and not load.cast
        work = _PLAIN_COMPILED if saves else _AUTOCAST if load.cast else _PLAIN
    elif not how.recompute:
        work = _KEEP_ALL
    else:
        work = _COMPILED if how.compile else _EAGER
    units = work.base
    if own and how.recompute:
        units -= _SPARED_UNITS * how.in_parts
        heads = _HEADS_IN_PARTS_UNITS if how.in_parts else _HEADS_UNITS
        units += heads * (how.attention is None)
        units += _TRAVEL_UNITS * ((how.inputs == "host") + (how.attention == "host"))
    low = load.low if own else 2 * load.low  # PEFT's are float32
    return int(units * load.unit + work.wide * load.wide + work.dora * load.dora) + low + load.cast


def _host(load: Workload, how: Measures) -> dict[str, int]:
    parts = dict.fromkeys(("frozen_weights", "optimizer_state", *_KEPT[:2]), 0)
    if how.weights == "host":
        parts["frozen_weights"] = slabs_size(_stored(load, how) // load.layers, load.layers)
    if how.optimizer == "host":
        parts["optimizer_state"] = 2 * load.locked
    if how.inputs == "host":
        parts["block_inputs"] = pool_size(load.unit, load.layers)
    if how.attention == "host":
        both = load.layers * (1 + (how.inputs == "host"))  # they share a pool
        parts["attention_outputs"] = pool_size(load.unit, both) - parts["block_inputs"]
    return parts
