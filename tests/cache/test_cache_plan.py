"""The order of an epoch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogcache.cache.plan import epoch_batches, share, steps_per_epoch

buckets_lists = st.lists(st.sampled_from(["a", "b", ("c", 1)]), max_size=60)
small = st.integers(1, 9)
seeds = st.integers(0, 2**40)


@settings(max_examples=200)
@given(buckets_lists, seeds, st.integers(0, 1000), small)
def test_every_index_once_and_batches_of_one_bucket(
    buckets: list[object], seed: int, epoch: int, size: int
) -> None:
    batches = epoch_batches(buckets, seed, epoch, size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(buckets)))
    assert all(len({buckets[index] for index in batch}) == 1 for batch in batches)
    assert len(batches) == steps_per_epoch(buckets, size)
    for bucket in set(buckets):
        sizes = sorted(len(batch) for batch in batches if buckets[batch[0]] == bucket)
        assert all(found == size for found in sizes[1:])
        assert 1 <= sizes[0] <= size
    assert batches == epoch_batches(list(buckets), seed, epoch, size)


@given(seeds, st.integers(0, 100))
def test_epochs_and_seeds_differ(seed: int, epoch: int) -> None:
    buckets = ["a"] * 40
    one = epoch_batches(buckets, seed, epoch, 4)
    assert one != epoch_batches(buckets, seed, epoch + 1, 4)
    assert one != epoch_batches(buckets, seed + 1, epoch, 4)
    assert sorted(map(sorted, one)) != sorted(map(sorted, epoch_batches(buckets, seed, epoch + 1, 4)))


def test_every_place_is_equally_likely() -> None:
    epochs, count = 4000, 8
    seen = [[0] * count for _ in range(count)]
    for epoch in range(epochs):
        for place, (index,) in enumerate(epoch_batches("a" * count, 7, epoch, 1)):
            seen[index][place] += 1
    expected = epochs / count
    chi_squared = sum((found - expected) ** 2 / expected for row in seen for found in row)
    assert chi_squared < 90  # 49 degrees of freedom: 90 is beyond the 99.9th percentile


def test_the_order_is_fixed_for_all_time() -> None:
    assert epoch_batches("aabbaab", 42, 3, 2) == epoch_batches(tuple("aabbaab"), 42, 3, 2)
    assert epoch_batches("aabbaab", 42, 3, 2) == [(3, 6), (1, 5), (4, 0), (2,)]


@settings(max_examples=200)
@given(st.integers(1, 40), small, st.integers(1, 8))
def test_shares_partition_the_batch(count: int, size: int, processes: int) -> None:
    batch = tuple(range(100, 100 + count))
    shares = [share(batch, size, process, processes) for process in range(processes)]
    assert len({len(micros) for micros in shares}) == 1
    assert all(len(micro) == size for micros in shares for micro in micros)
    slots = [slot for micro in zip(*shares, strict=True) for part in micro for slot in part]
    assert tuple(slots[:count]) == batch
    assert set(slots[count:]) <= {None}
    assert len(slots) - count < size * processes


@given(buckets_lists.filter(bool), seeds, st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1)]))
def test_the_number_of_processes_does_not_change_what_is_learned(
    buckets: list[object], seed: int, split: tuple[int, int]
) -> None:
    processes, size = split
    for batch in epoch_batches(buckets, seed, 0, 8):
        shares = [share(batch, size, process, processes) for process in range(processes)]
        found = [slot for micros in shares for micro in micros for slot in micro if slot is not None]
        assert sorted(found) == sorted(batch)


@pytest.mark.parametrize(
    "call",
    [
        lambda: epoch_batches("ab", 0, 0, 0),
        lambda: steps_per_epoch("ab", 0),
        lambda: share((1,), 0, 0, 1),
        lambda: share((1,), 1, 0, 0),
        lambda: share((1,), 1, 2, 2),
        lambda: share((1,), 1, -1, 2),
    ],
)
def test_nonsense_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        call()


def test_nothing_to_do() -> None:
    assert epoch_batches([], 0, 0, 4) == []
    assert steps_per_epoch([], 4) == 0
    assert share((), 2, 0, 2) == []
