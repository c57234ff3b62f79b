"""Plans, draws and reading ahead.

Mutations tried, each caught: draws without the epoch; one stream for two purposes; plans that start over on resume.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogcache.cache.reader import CacheReader
from cogcache.config import TrainConfig
from cogcache.errors import CacheError
from cogcache.geometry import Size
from cogcache.tiny import Family
from cogcache.train.data import Micro, Samples, read_ahead, step_plans
from cogcache.variants import Variant

Settings = Callable[..., TrainConfig]
MakeCache = Callable[..., Path]
Facts = Callable[[Family], Variant]


@pytest.fixture
def samples(settings: Settings, make_cache: MakeCache, variant_of: Facts) -> Callable[..., Samples]:
    def make(family: Family = "5b", clips: Any = None, **changes: Any) -> Samples:
        root = make_cache(family, clips)
        return Samples(CacheReader(root), variant_of(family), settings(shards=root, **changes))

    return make


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("batch_size", "grad_accum"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_every_sample_once_an_epoch_however_it_is_dealt(
    samples: Callable[..., Samples], settings: Settings, processes: int, batch_size: int, grad_accum: int
) -> None:
    records = samples("5b", [(9, Size(32, 48))] * 5 + [(9, Size(32, 32))] * 2).records
    config = settings(steps=30, batch_size=batch_size, grad_accum=grad_accum)
    epochs: dict[int, list[int]] = {}
    for number, plan in enumerate(step_plans(records, config, processes), 1):
        assert plan.number == number
        counted = [index for process in range(processes) for index in plan.real(process)]
        assert sorted(counted) == sorted(plan.batch)
        assert len({(records[i].height, records[i].width) for i in plan.batch}) == 1
        assert len({len(micros) for micros in plan.micros}) == 1
        for micro in (m for micros in plan.micros for m in micros):
            assert 1 <= len(micro.samples) <= batch_size
            assert micro.real == len(micro.samples) or (micro.real == 0 and len(micro.samples) == 1)
            assert {records[i].width for i in micro.samples} == {records[plan.batch[0]].width}
        epochs.setdefault(plan.epoch, []).extend(counted)
    complete = list(epochs.values())[:-1]
    assert complete or len(epochs) == 1
    for seen in complete:
        assert sorted(seen) == list(range(7))
    assert len({tuple(seen) for seen in complete}) > len(complete) // 2  # few samples, so orders may recur


def test_plans_go_on_in_the_middle_of_an_epoch(samples: Callable[..., Samples], settings: Settings) -> None:
    records = samples().records
    config = settings(steps=11, batch_size=2)
    assert list(step_plans(records, config, 1, done=5)) == list(step_plans(records, config, 1))[5:]


def test_draws_depend_on_epoch_and_sample_not_on_company(samples: Callable[..., Samples]) -> None:
    data = samples()
    together = data.batch(Micro(0, (2, 0, 1), 3))
    alone = data.batch(Micro(0, (0,), 1))
    later = data.batch(Micro(1, (0,), 1))
    for field in ("noise_bpchw", "posterior_noise_bcfhw", "timesteps_b"):
        assert torch.equal(getattr(together, field)[1], getattr(alone, field)[0])
        assert not torch.equal(getattr(alone, field), getattr(later, field))
        assert not torch.equal(getattr(together, field)[1], getattr(together, field)[2])
    assert torch.equal(together.moments_bcfhw[1], later.moments_bcfhw[0])
    flat = [alone.noise_bpchw.flatten(), alone.posterior_noise_bcfhw.flatten()]
    assert not torch.equal(*flat)


def test_timesteps_are_uniform_and_noise_is_normal(samples: Callable[..., Samples]) -> None:
    data = samples()
    record = data.records[0]
    drawn = torch.tensor([data.timestep(epoch, record) for epoch in range(20000)])
    assert drawn.min() == 0
    assert drawn.max() == 999
    counts = torch.histc(drawn.float(), bins=10, min=0, max=1000)
    assert (counts - 2000).abs().max() < 200
    batches = [data.batch(Micro(epoch, (0, 1, 2), 3)) for epoch in range(5)]
    noise = torch.cat([batch.noise_bpchw.flatten() for batch in batches])
    assert noise.mean().abs() < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_noise_covers_the_padding_frames_of_1_5(samples: Callable[..., Samples]) -> None:
    batch = samples("1.5-5b", [(17, Size(32, 48))]).batch(Micro(0, (0,), 1))
    assert batch.moments_bcfhw.shape == (1, 32, 5, 4, 6)
    assert batch.posterior_noise_bcfhw.shape == (1, 16, 5, 4, 6)
    assert batch.noise_bpchw.shape == (1, 6, 16, 4, 6)
    assert not torch.equal(batch.noise_bpchw[:, 0], batch.noise_bpchw[:, 1])


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_caption_dropout_is_drawn_anew_each_epoch(samples: Callable[..., Samples], rate: float) -> None:
    data = samples(caption_dropout=rate)
    empty = data.reader.read("text", data.reader.manifest.unconditional).tensors["prompt_embeds"]
    own = data.reader.read("text", data.records[0].text).tensors["prompt_embeds"]
    dropped = 0
    for epoch in range(200):
        text = data.batch(Micro(epoch, (0,), 1)).prompt_embeds_bld[0]
        assert torch.equal(text, empty) or torch.equal(text, own)
        dropped += torch.equal(text, empty)
    assert abs(dropped / 200 - rate) <= (0.1 if 0 < rate < 1 else 0)


def test_image_conditions_are_drawn_from_the_bank_and_dropped(samples: Callable[..., Samples]) -> None:
    data = samples("5b-i2v", [(9, Size(64, 96))], image_dropout=0.25)
    bank = [data.reader.read("images", key).tensors["latents"] for key in data.records[0].images]
    seen = [0] * (len(bank) + 1)
    for epoch in range(200):
        image = data.batch(Micro(epoch, (0,), 1)).image_latents_bcfhw
        assert image is not None
        choices = [*bank, torch.zeros_like(bank[0])]
        matches = [number for number, choice in enumerate(choices) if torch.equal(image[0], choice)]
        assert len(matches) == 1
        seen[matches[0]] += 1
    assert abs(seen[-1] - 50) <= 20
    assert min(seen[:-1]) > 25


def test_image_to_video_needs_a_bank(settings: Settings, make_cache: MakeCache, variant_of: Facts) -> None:
    with pytest.raises(CacheError, match="has no image conditions"):
        Samples(CacheReader(make_cache("5b")), variant_of("5b-i2v"), settings())


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_read_ahead_keeps_the_order(workers: int) -> None:
    assert list(read_ahead(lambda n: n * n, range(50), workers)) == [n * n for n in range(50)]


def test_read_ahead_raises_in_place_and_ends_its_threads() -> None:
    def load(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    before = threading.active_count()
    results = read_ahead(load, range(100), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert threading.active_count() == before


def test_read_ahead_stops_when_closed_and_does_not_run_far_ahead() -> None:
    loaded: list[int] = []
    results = read_ahead(lambda n: loaded.append(n) or n, range(10**9), 2)
    assert next(results) == 0
    before = threading.active_count()
    results.close()
    assert threading.active_count() < before
    assert len(loaded) <= 6
