"""The order of training as a pure function of (samples, seed, epoch, global batch).

Mutations tried, each caught: plans that depend on the number of processes; a share that drops the last samples; every
epoch like the first; batches over two buckets; plans that start over on resume; a process without microbatch.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cogcache.cache.format import SampleRecord
from cogcache.cache.plan import steps_per_epoch
from cogcache.config import TrainConfig
from cogcache.geometry import Bucket
from cogcache.train.data import StepPlan, read_ahead, step_plans

GLOBAL_BATCH = 8
BUCKETS = [Bucket(9, 32, 48), Bucket(17, 32, 48), Bucket(9, 48, 32)]


def record(number: int, bucket: Bucket) -> SampleRecord:
    return SampleRecord(
        id=f"{number:04d}", source=f"{number}.mp4", sha256="0" * 64, window="start", caption="", fps=8.0,
        frames=bucket.frames, height=bucket.height, width=bucket.width, latents="l", text="t",
    )  # fmt: skip


@st.composite
def deals(draw: st.DrawFn) -> tuple[int, TrainConfig]:
    """A number of processes, and settings that share the global batch among them."""
    processes = draw(st.sampled_from([1, 2, 4, 8]))
    each = GLOBAL_BATCH // processes
    size = draw(st.sampled_from([n for n in (1, 2, 4, 8) if each % n == 0]))
    return processes, config(batch_size=size, grad_accum=each // size)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(shards=Path("none"), steps=10_000, seed=3, **changes)


def plans(records: list[SampleRecord], deal: tuple[int, TrainConfig], first: int, end: int) -> list[StepPlan]:
    processes, how = deal
    return list(islice(step_plans(records, how, processes, first), end - first))


record_lists = st.lists(st.sampled_from(BUCKETS), min_size=1, max_size=60).map(
    lambda buckets: [record(number, bucket) for number, bucket in enumerate(buckets)]
)


@settings(max_examples=150)
@given(record_lists, deals(), st.integers(0, 5))
def test_every_clip_once_in_batches_of_one_bucket_and_no_process_waits(
    records: list[SampleRecord], deal: tuple[int, TrainConfig], epoch: int
) -> None:
    processes, how = deal
    steps = steps_per_epoch([row.bucket for row in records], GLOBAL_BATCH)
    found = plans(records, deal, epoch * steps, (epoch + 1) * steps)
    assert [plan.epoch for plan in found] == [epoch] * steps
    seen = [index for plan in found for process in range(processes) for index in plan.real(process)]
    assert sorted(seen) == list(range(len(records)))
    for plan in found:
        assert len({records[index].bucket for index in plan.batch}) == 1
        assert len(plan.micros) == processes
        assert len({len(micros) for micros in plan.micros}) == 1  # all take part in every exchange
        ran = [micro for micros in plan.micros for micro in micros]
        assert ran
        assert all(1 <= len(micro.samples) <= how.batch_size for micro in ran)
        assert {records[i].bucket for micro in ran for i in micro.samples} == {records[plan.batch[0]].bucket}
        counts = [len(plan.real(process)) for process in range(processes)]
        assert max(counts) - min(counts) <= how.batch_size
        if len(plan.batch) == GLOBAL_BATCH:
            assert set(counts) == {GLOBAL_BATCH // processes}


@settings(max_examples=150)
@given(record_lists, deals(), deals(), st.data())
def test_stopped_at_any_step_and_gone_on_with_other_processes_is_the_same_run(
    records: list[SampleRecord],
    one: tuple[int, TrainConfig],
    other: tuple[int, TrainConfig],
    data: st.DataObject,
) -> None:
    end = data.draw(st.integers(1, 30))
    stop = data.draw(st.integers(0, end))
    whole = plans(records, one, 0, end)
    parts = plans(records, one, 0, stop) + plans(records, other, stop, end)
    assert [(p.number, p.epoch, p.batch) for p in parts] == [(p.number, p.epoch, p.batch) for p in whole]
    for ours, theirs in zip(parts, whole, strict=True):
        dealt = [
            sorted(index for process in range(processes) for index in plan.real(process))
            for plan, processes in ((ours, len(ours.micros)), (theirs, len(theirs.micros)))
        ]
        assert dealt[0] == dealt[1] == sorted(whole[ours.number - 1].batch)
    assert plans(records, one, stop, end) == whole[stop:]


@given(st.lists(st.sampled_from(BUCKETS), min_size=20, max_size=60), st.integers(0, 50))
def test_epochs_differ_but_not_in_what_they_hold(buckets: list[Bucket], epoch: int) -> None:
    records = [record(number, bucket) for number, bucket in enumerate(buckets)]
    steps = steps_per_epoch(buckets, GLOBAL_BATCH)
    deal = (2, config(batch_size=4, grad_accum=1))
    first, second = (
        [plan.batch for plan in plans(records, deal, e * steps, (e + 1) * steps)] for e in (epoch, epoch + 1)
    )
    assert first != second
    assert sorted(index for batch in first for index in batch) == sorted(i for batch in second for i in batch)


@settings(max_examples=20, deadline=None)
@given(record_lists, deals(), st.integers(0, 6))
def test_threads_change_nothing(
    records: list[SampleRecord], deal: tuple[int, TrainConfig], workers: int
) -> None:
    micros = [micro for plan in plans(records, deal, 0, 12) for micro in plan.micros[0]]
    assert list(read_ahead(lambda micro: (micro.epoch, micro.samples), micros, workers)) == [
        (micro.epoch, micro.samples) for micro in micros
    ]
