"""The benchmark of design decisions changes in a training what it says, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from making_caches import SMALL, write_cache

from cogcache.cache.reader import CacheReader
from cogcache.config import TrainConfig
from cogcache.tiny import Family
from cogcache.train import objective
from cogcache.train.data import Batch, Micro, Samples

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import design_decisions as benchmark


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, tiny_models: Callable[[Family], Path]) -> Samples:
    """Of an image-to-video cache with three draws of each first frame."""
    root = tmp_path_factory.mktemp("decisions") / "shards"
    reader = CacheReader(write_cache(root, tiny_models("5b-i2v"), [SMALL] * 3))
    return Samples(reader, reader.manifest.model.variant, TrainConfig(shards=str(root), image_dropout=0.0))


def batches(samples: Samples, patch: benchmark.Patch = nullcontext) -> list[Batch]:
    """The same clips in three epochs."""
    with patch():
        return [samples.batch(Micro(epoch, (0, 1, 2), 3)) for epoch in range(3)]


def changed(one: Batch, other: Batch) -> set[str]:
    names = [name for name in vars(one) if getattr(one, name) is not None]
    return {name for name in names if not torch.equal(getattr(one, name), getattr(other, name))}


def test_a_frozen_sample_is_the_same_in_every_epoch(samples: Samples) -> None:
    usual, frozen = batches(samples), batches(samples, benchmark.frozen_sample)
    assert "posterior_noise_bcfhw" in changed(usual[0], usual[1])
    assert "posterior_noise_bcfhw" not in changed(frozen[0], frozen[1]) | changed(frozen[0], frozen[2])
    assert changed(usual[0], frozen[0]) == set()
    assert changed(usual[1], frozen[1]) == {"posterior_noise_bcfhw"}
    assert changed(usual[1], batches(samples)[1]) == set()  # the patch is gone again


def test_draws_of_a_bank(samples: Samples) -> None:
    def drawn(patch: benchmark.Patch) -> list[set[int]]:
        """Numbers of the draws that each clip sees in eight epochs."""
        rows = samples.records
        with patch():
            return [{row.images.index(samples._image(epoch, row)) for epoch in range(8)} for row in rows]

    assert drawn(benchmark.bank(1)) == [{0}] * 3
    assert set.union(*drawn(benchmark.bank(2))) == {0, 1}
    assert drawn(benchmark.bank(3)) == drawn(nullcontext)
    with benchmark.fresh_draws():
        first = samples.records[0]
        assert [first.images.index(samples._image(epoch, first)) for epoch in range(3)] == [0, 1, 2]
        with pytest.raises(IndexError):  # never the same noise twice without a word
            samples._image(3, first)
    assert changed(batches(samples)[1], batches(samples, benchmark.bank(1))[1]) <= {"image_latents_bcfhw"}


def test_noising_in_bfloat16() -> None:
    source = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 5, 16, 4, 4, generator=source) for _ in range(2))
    abar = torch.tensor([0.9995, 0.3])
    exact = objective.add_noise(clean, noise, abar), objective.velocity(clean, noise, abar)
    with benchmark.bfloat16_noising():
        rounded = objective.add_noise(clean, noise, abar), objective.velocity(clean, noise, abar)
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(other, other.bfloat16().float())
        assert 0 < (one - other).abs().max() < 0.1


def test_the_table_takes_differences_seed_by_seed() -> None:
    rows = [{"new": 1.0, "known": 2.0}, {"new": 2.0, "known": 1.0}]
    worse = [{"new": row["new"] + 0.25, "known": row["known"] - 0.25} for row in rows]
    part = {"base": {"new": 3.0, "known": 3.0}, "ways": {"a": rows, "b": worse}, "facts": {}}
    last = benchmark.table({"moments": part}).splitlines()[-1]
    assert "+0.25000 ± 0.00000" in last
    assert "-0.25000 ± 0.00000" in last


def test_a_bank_has_a_draw_for_every_epoch(tmp_path: Path) -> None:
    for steps, clips in ((300, 20), (7, 4), (100, 9)):
        plan = benchmark.Plan(tmp_path, steps, clips, 1, "cpu", None)
        per_epoch = -(-2 * clips // benchmark.BATCH)
        assert plan.epochs > (steps - 1) // per_epoch


def test_every_part_has_ways_of_different_names() -> None:
    for part in benchmark.PARTS:
        names = [way.name for way in benchmark.ways(part)]
        assert len(names) == len(set(names)) > 1
