"""The order of an epoch: a pure function of (buckets, seed, epoch, global batch), and nothing else.

Whoever holds the same table of samples gets the same batches, on any machine, with any version of any
library: the shuffle is SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
2014) over the index, keyed by a hash of seed and epoch, and a stable sort by the result.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from cogcache.draws import seed_for

__all__ = ["epoch_batches", "share", "steps_per_epoch"]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def epoch_batches(
    buckets: Sequence[Hashable], seed: int, epoch: int, global_batch: int
) -> list[tuple[int, ...]]:
    """The optimizer steps of one epoch, as indices into the samples.

    Args:
        buckets: Bucket of each sample; a batch never mixes two.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        global_batch: Samples in one optimizer step, over all processes and micro-batches.

    Returns:
        Batches in the order in which they are trained. Every index comes exactly once. Each bucket's last
        batch may be smaller; it is shuffled among the others.

    Raises:
        ValueError: if ``global_batch`` is below 1.
    """
    _at_least_one(global_batch=global_batch)
    members: dict[Hashable, list[int]] = {bucket: [] for bucket in buckets}
    for index in _shuffled(len(buckets), "samples", seed, epoch).tolist():
        members[buckets[index]].append(index)
    batches = [
        tuple(indices[start : start + global_batch])
        for indices in members.values()
        for start in range(0, len(indices), global_batch)
    ]
    return [batches[place] for place in _shuffled(len(batches), "batches", seed, epoch).tolist()]


def steps_per_epoch(buckets: Sequence[Hashable], global_batch: int) -> int:
    """How many batches :func:`epoch_batches` makes; the same in every epoch."""
    _at_least_one(global_batch=global_batch)
    counts: dict[Hashable, int] = {}
    for bucket in buckets:
        counts[bucket] = counts.get(bucket, 0) + 1
    return sum(-(-count // global_batch) for count in counts.values())


def share(
    batch: tuple[int, ...], batch_size: int, process: int, processes: int
) -> list[tuple[int | None, ...]]:
    """The micro-batches of one process for one optimizer step.

    The batch is dealt micro-major: micro-batch 0 of process 0, of process 1, ..., then micro-batch 1 of
    process 0, and so on. Every process gets the same number of micro-batches with ``batch_size`` slots each.

    Args:
        batch: One batch of :func:`epoch_batches`.
        batch_size: Slots in one micro-batch.
        process: Rank of this process, from 0.
        processes: Number of processes.

    Returns:
        Micro-batches of indices; None is a filler that must get weight 0.

    Raises:
        ValueError: if a count is below 1 or ``process`` is not a rank.
    """
    _at_least_one(batch_size=batch_size, processes=processes)
    if not 0 <= process < processes:
        raise ValueError(f"process {process} is not one of {processes}")
    rounds = -(-len(batch) // (batch_size * processes))
    slots = [*batch, *[None] * (rounds * batch_size * processes - len(batch))]
    starts = ((micro * processes + process) * batch_size for micro in range(rounds))
    return [tuple(slots[start : start + batch_size]) for start in starts]


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")


def _shuffled(count: int, *parts: object) -> npt.NDArray[np.int64]:
    """A permutation of ``range(count)`` decided by ``parts``: indices sorted by their SplitMix64 output."""
    state = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA + np.uint64(seed_for("order", *parts))
    state = (state ^ (state >> np.uint64(30))) * _MIX1
    state = (state ^ (state >> np.uint64(27))) * _MIX2
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable")
