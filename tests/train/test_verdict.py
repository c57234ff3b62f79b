"""Where the time of a run went, told in a line, and in ``metrics.jsonl``.

Mutations tried, each caught: the first step of a bucket counted; the share of another phase told; waiting told when it
does not matter, or in place of where the time went; recomputed operations left out of a step's; the second microbatch
left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogcache.cache.reader import CacheReader
from cogcache.config import TrainConfig
from cogcache.geometry import Bucket, Size
from cogcache.train import train
from cogcache.train.clock import PHASES, StepTimes
from cogcache.train.data import Micro, Samples, StepPlan
from cogcache.train.flops import step_flops
from cogcache.train.model import add_lora, load_transformer
from cogcache.train.report import Report, StepResult
from cogcache.train.verdict import Tally
from cogcache.variants import read_variant

Settings = Callable[..., TrainConfig]


def times(**phases: float) -> StepTimes:
    return StepTimes({**dict.fromkeys(PHASES, 0.0), **phases})


def test_waiting_for_data_is_told_with_what_to_do(settings: Settings) -> None:
    tally = Tally(settings(workers=3), None)
    tally.add(times(data=0.4, forward=0.6), 10**12)
    tally.add(times(forward=1.0), 10**12)
    where, waited = tally.verdict(5 << 30)
    assert waited.startswith(
        "Data was waited for 20% of the time: raise --workers (now 3), or put the shards"
    )
    assert where == (
        "Where the time went: data 20%, forward 80%, backward 0%, optimizer 0%, other 0%. "
        "1 TFLOP/s. Peak: 5.00 GiB of GPU memory."
    )
    far = Tally(settings(shards="s3://bucket/shards"), None)
    far.add(times(data=1.0), 1)
    assert "--remote-cache-size" in str(far.verdict(None))


def test_otherwise_one_line_alone_says_where_time_went(settings: Settings) -> None:
    tally = Tally(settings(), 800e12)
    assert tally.verdict(None) == []
    tally.add(times(data=0.05, forward=0.3, backward=0.6, optimizer=0.04, other=0.01), 400 * 10**12)
    assert tally.verdict(5 << 30) == [
        "Where the time went: data 5%, forward 30%, backward 60%, optimizer 4%, other 1%. "
        "400 TFLOP/s, 50% of the 800 that products alone reach. Peak: 5.00 GiB of GPU memory."
    ]


def test_steps_that_may_compile_are_left_out_and_told(
    settings: Settings, make_cache: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = settings(shards=make_cache("5b", [(9, Size(32, 48)), (17, Size(32, 48))]))
    reader = CacheReader(config.shards)
    samples = Samples(reader, reader.manifest.model.variant, config)
    micros = ((Micro(0, (0,), 1),),)

    def step(report: Report, number: int, sample: int, seconds: float) -> None:
        plan = StepPlan(number, 0, (sample,), micros)
        result = StepResult({sample: 1.0}, 1.0, 0.1, 0, False, times(forward=seconds), 10**12)
        report.step(plan, result)

    tmp_path.joinpath("run").mkdir()
    with Report(config, tmp_path / "run", samples, torch.device("cpu"), 0, compiles=True) as report:
        for number, (sample, seconds) in enumerate([(0, 30.0), (1, 20.0), (0, 2.0), (1, 2.0)], 1):
            step(report, number, sample, seconds)
    told = capsys.readouterr().err
    assert told.count("Compiled in 28 s") == told.count("Compiled") == 1
    assert "0.5 TFLOP/s." in told


def test_every_step_is_split_in_the_metrics(
    settings: Settings, tiny_models: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(steps=3, batch_size=1, grad_accum=2, gradient_checkpointing=True, rank=2)
    train(config)
    root = tiny_models("5b")
    transformer = load_transformer(root, torch.float32)
    add_lora(transformer, config)
    transformer.enable_gradient_checkpointing()
    one = step_flops(transformer, read_variant(root), Bucket.of(9, Size(32, 48))).total
    for line in map(json.loads, (config.output / "metrics.jsonl").read_text().splitlines()):
        parts = [line[f"{phase}_s"] for phase in PHASES]
        assert all(part >= 0 for part in parts)
        assert sum(parts) == pytest.approx(line["seconds"])
        assert line["forward_s"] > 0
        assert line["backward_s"] > 0
        micros = len(line["samples"])
        assert line["tflop_per_s"] * line["seconds"] == pytest.approx(micros * one / 1e12)
        assert "ceiling_share" not in line
    told = capsys.readouterr().err
    assert "Where the time went" in told
