"""How the blocks will run is decided before any weight is read, and what was expected is told beside what was measured.

Mutations tried, each caught: the slowest that fits taken; host memory not looked at; the weights loaded before the
decision; the only tier taken though it does not fit; a named tier refused; the LoRA left out of the model without
weights; the mean over clips not weighted; the first steps counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate import DistributedType
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogcache.bench.real import real_config
from cogcache.config import TrainConfig
from cogcache.errors import ConfigError, LoraError, NothingFitsError
from cogcache.geometry import Bucket, Size
from cogcache.lora import read_lora_header
from cogcache.tiny import Family
from cogcache.tiny.families import facts_of
from cogcache.train import stage
from cogcache.train.flops import step_flops
from cogcache.train.full import train_everything
from cogcache.train.memory import place
from cogcache.train.memory.choose import candidates, choose
from cogcache.train.memory.choose import forecasts as forecasts_of
from cogcache.train.memory.estimate import Estimate, Need
from cogcache.train.memory.forecast import Forecast, Job, unloaded_transformer
from cogcache.train.memory.gpus import CARDS
from cogcache.train.memory.measures import TIERS, TINY, Measures
from cogcache.train.memory.outcome import outcome, typical_seconds
from cogcache.train.memory.speed import Rates
from cogcache.train.memory.table import tier_table
from cogcache.train.memory.workload import workload_of
from cogcache.train.model import add_lora, load_transformer
from cogcache.variants import Variant, read_config, read_variant, variant_of

Settings = Callable[..., TrainConfig]
Models = Callable[[Family], Path]

GIB = 2**30
PLENTY = 256
FAMILIES: list[Family] = ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
AUTO = TrainConfig(shards=Path("unused"))


def some_buckets(variant: Variant) -> list[Bucket]:
    whole = Bucket.of(variant.sample_frames, variant.default_size)
    return [whole] if variant.fixed_grid else [whole, Bucket.of(9, Size(32, 48))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_alone_give_the_workload_of_the_loaded_model(
    family: Family, dtype: torch.dtype, tiny_models: Models
) -> None:
    root = tiny_models(family)
    variant = read_variant(root)
    buckets = some_buckets(variant)
    settings: list[dict[str, Any]] = [
        {"rank": 3},
        {"rank": 5, "target_modules": ["attention+ff"], "dora": True},
    ]
    for changes in settings:
        config = TrainConfig(shards=Path("unused"), **changes)
        loaded: Any = load_transformer(root, dtype)
        add_lora(loaded, config)
        loaded.enable_gradient_checkpointing()
        bare = unloaded_transformer(read_config(root, "transformer/config.json"), config, dtype)
        assert {p.device.type for p in bare.parameters()} == {"meta"}
        assert workload_of(bare, variant, buckets, 2) == workload_of(loaded, variant, buckets, 2)
        assert step_flops(bare, variant, buckets[0]) == step_flops(loaded, variant, buckets[0])


@pytest.mark.parametrize("family", ["2b", "5b-i2v"])
def test_shapes_alone_give_the_workload_of_full_training(family: Family, tiny_models: Models) -> None:
    root, config = tiny_models(family), TrainConfig(shards=Path("unused"), training_type="full")
    variant, loaded = read_variant(root), load_transformer(root, torch.float32)
    train_everything(loaded, torch.device("cpu"), torch.bfloat16)
    bare = unloaded_transformer(read_config(root, "transformer/config.json"), config, torch.bfloat16)
    buckets, compute = some_buckets(variant), torch.bfloat16
    assert workload_of(bare, variant, buckets, 1, compute) == workload_of(
        loaded, variant, buckets, 1, compute
    )
    assert workload_of(bare, variant, buckets, 1, compute).blocks == 0


@cache
def big() -> Job:
    """5B of published size, 49x480x720."""
    facts = facts_of("5b")
    shape = real_config("5b", facts.transformer())
    variant = variant_of(shape, facts.vae(), facts.scheduler())
    transformer = unloaded_transformer(shape, AUTO, torch.bfloat16)
    return Job(transformer, variant, {Bucket(49, 480, 720): 1}, AUTO, torch.bfloat16)


def forecasts(config: TrainConfig, rates: Rates | None = None, host: float = PLENTY) -> list[Forecast]:
    return forecasts_of(big(), candidates(config), rates, Need(0, int(host * GIB)))


def tier_for(config: TrainConfig, device: float, host: float = PLENTY) -> str:
    return choose(forecasts(config, host=host), Need(int(device * GIB), int(host * GIB)), config).tier


def test_auto_takes_the_fastest_that_fits() -> None:
    assert [tier_for(AUTO, gib) for gib in (140, 40, 12, 4.5)] == ["fast", "balanced", "small", "tiny"]
    needs = [forecast.memory.device for forecast in forecasts(AUTO)]
    assert needs == sorted(needs, reverse=True)
    seconds = [forecast.mean_s for forecast in forecasts(AUTO, CARDS[0].rates)]
    assert seconds == sorted(seconds, key=lambda s: s or 0)


def test_auto_refuses_with_a_table_of_what_each_would_need() -> None:
    with pytest.raises(ConfigError, match="no memory tier fits") as caught:
        tier_for(AUTO, 2)
    table = caught.value.message
    assert all(tier in table for tier in TIERS)
    assert all(
        name in table for name in ("frozen weights of the blocks", "optimizer state", "together", "fits")
    )
    with pytest.raises(ConfigError, match="host memory"):
        tier_for(AUTO, 12, host=8)  # the GPU has room for 'small', the host has not
    assert tier_for(AUTO.model_copy(update={"memory": "small"}), 1) == "small"


def test_single_flags_change_a_tier(settings: Settings) -> None:
    config = settings(
        memory="small", gradient_checkpointing=None, keep_attention="no", base_weights="device", compile=False
    )
    [(tier, [measures])] = candidates(config)
    assert tier == "small"
    assert measures == replace(TIERS["small"], attention=None, weights="device", compile=False)


@pytest.mark.parametrize(
    ("host", "taken", "given_up"),
    [
        (64, 0, ""),
        (28, 0, ""),
        (22, 1, "attention is computed again"),
        (14, 2, "attention is computed again and the base's matrices are kept in 8 bits"),
        (4, 2, "attention is computed again and the base's matrices are kept in 8 bits"),
    ],
)
def test_tiny_gives_up_what_it_must_on_small_hosts(host: float, taken: int, given_up: str) -> None:
    """First what leaves gradients as they are. Where nothing fits, the least is what is told, and tried."""
    found = forecasts(AUTO, host=host)[-1]
    assert (found.tier, found.measures) == ("tiny", TINY[taken])
    assert found.given_up.startswith(given_up)
    assert bool(found.given_up) == bool(given_up)
    assert ("host memory is short" in tier_table([found], Need(0, int(host * GIB)))) == bool(given_up)
    if host != 4:
        assert tier_for(AUTO, 6, host) == ("small" if host >= 28 else "tiny")


def test_flags_and_dora_leave_fewer_variants() -> None:
    def variants(**changes: Any) -> list[Measures | None]:
        [(_, found)] = candidates(TrainConfig(shards=Path("unused"), memory="tiny", **changes))
        return [*found]

    assert variants() == [*TINY]
    assert variants(dora=True) == [*TINY[:2]]
    assert variants(base_storage="native", keep_attention="host", optimizer_state="host") == [TINY[0]]
    assert variants(base_storage="int8", keep_attention="no") == [
        replace(TINY[2], optimizer="host"),
        TINY[2],
    ]
    whole = TrainConfig(shards=Path("unused"), gradient_checkpointing=False)
    assert [tier for tier, _ in candidates(whole)] == ["fast", "balanced"]


def test_gradients_stay_where_a_step_has_several_parts() -> None:
    one = big().forecast("plain", None).memory
    parts = replace(big(), config=AUTO.model_copy(update={"grad_accum": 2})).forecast("plain", None).memory
    several = replace(big(), processes=2).forecast("plain", None).memory
    assert one.device_parts["gradients"] == 0
    assert parts == several
    assert several.device - one.device == several.device_parts["gradients"] > 0


def test_times_are_those_of_all_clips_and_memory_that_of_the_largest() -> None:
    small, large = Bucket(9, 480, 720), Bucket(49, 480, 720)
    job, rates = replace(big(), clips={small: 3, large: 1}), CARDS[0].rates
    mixed = job.forecast("small", TIERS["small"], rates)
    alone = big().forecast("small", TIERS["small"], rates)
    assert mixed.memory == alone.memory
    assert mixed.seconds[large] == alone.mean_s
    assert mixed.mean_s == pytest.approx((3 * mixed.seconds[small] + mixed.seconds[large]) / 4)
    assert mixed.typical_s == mixed.seconds[small] < mixed.seconds[large]
    assert job.forecast("small", TIERS["small"]).mean_s is None
    wide = replace(job, compute=torch.float32)
    assert wide.forecast("small", TIERS["small"], rates).mean_s is None  # nothing is known of float32
    twice = replace(big(), config=AUTO.model_copy(update={"grad_accum": 2})).forecast(
        "small", TIERS["small"], rates
    )
    assert twice.mean_s == pytest.approx(2 * (alone.mean_s or 0), rel=0.01)


def test_plain_blocks_that_are_compiled_are_forecast_so() -> None:
    rates = CARDS[0].rates
    eager = big().forecast("plain", None, rates)
    job = replace(big(), config=AUTO.model_copy(update={"compile": True}))
    compiled = job.forecast("plain", None, rates)
    assert (eager.compiled, compiled.compiled) == (False, True)
    assert (eager.mean_s or 0) - (compiled.mean_s or 0) == pytest.approx(3.643 - 2.835, rel=0.02)
    assert eager.memory.device - compiled.memory.device == pytest.approx(0.325 * GIB, rel=0.02)
    assert job.forecast("small", TIERS["small"], rates) == big().forecast("small", TIERS["small"], rates)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], SimpleNamespace]:
    """``gpu(12)``: what Accelerate would say on a GPU of which so many GiB are free; nothing is put on it."""

    def pretend(gib: float) -> SimpleNamespace:
        monkeypatch.setattr(place, "free_memory", lambda _: Need(int(gib * GIB), PLENTY * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
        return SimpleNamespace(
            device=torch.device("cuda"),
            distributed_type=DistributedType.NO,
            num_processes=1,
            process_index=0,
            is_main_process=True,
            wait_for_everyone=lambda: None,
        )

    return pretend


def test_train_refuses_before_any_weight_is_read(
    settings: Settings,
    gpu: Callable[[float], SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = settings(gradient_checkpointing=None, output=tmp_path / "run")

    def no_weights(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(place, "load_transformer", no_weights)
    monkeypatch.setattr(stage, "open_accelerator", lambda _: gpu(0.0001))
    with pytest.raises(ConfigError, match="no memory tier fits") as caught:
        stage.train(config)
    assert "frozen weights of the blocks" in caught.value.message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"training_type": "full"}, "--training-type lora"),
        ({"lora_dropout": 0.1, "rank": 2}, "no --lora-dropout"),
    ],
    ids=["full", "dropout"],
)
def test_train_refuses_too_where_there_is_but_one_tier(
    changes: dict[str, Any],
    advice: str,
    make_cache: Callable[..., Path],
    gpu: Callable[[float], SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Unless that one was named: then it is tried."""

    class WeightsWantedError(Exception):
        pass

    def no_weights(*_: object) -> None:
        raise WeightsWantedError

    monkeypatch.setattr(place, "load_transformer", no_weights)
    monkeypatch.setattr(stage, "product_ceiling", lambda _: None)
    monkeypatch.setattr(stage, "open_accelerator", lambda _: gpu(0.0001))
    config = TrainConfig(shards=make_cache("5b"), output=tmp_path / "run", device="cpu", **changes)
    with pytest.raises(NothingFitsError, match="only --memory plain, and it does not fit") as caught:
        stage.train(config)
    assert caught.value.exit_code == 6
    assert "GPU memory at the peak" in caught.value.message
    assert caught.value.message.split()[-1] == "no"  # the table's last row: does it fit?
    assert advice in caught.value.hint
    assert not (tmp_path / "run").exists()
    assert "NOTICE" not in capsys.readouterr().err
    with pytest.raises(WeightsWantedError):
        stage.train(config.model_copy(update={"memory": "plain"}))
    assert "NOTICE: that may not fit" in " ".join(capsys.readouterr().err.split())


def test_help_says_that_a_named_tier_is_tried() -> None:
    assert "One that is named is tried" in str(TrainConfig.model_fields["memory"].description)


@pytest.fixture
def hub(tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that holds one model, ``someone/model``, in float32; what it was asked for is listed."""
    root, snapshot, asked = tiny_models("5b"), tmp_path / "snapshot", list[str]()

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/model"
        for pattern in allow_patterns:
            for file in root.glob(pattern):
                (snapshot / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot / file.relative_to(root))
        asked.append("weights" if any("safetensors" in one for one in allow_patterns) else "configs")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_no_weights_are_fetched_for_what_does_not_fit(
    settings: Settings,
    gpu: Callable[[float], SimpleNamespace],
    hub: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(stage, "open_accelerator", lambda _: gpu(0.0001))
    changes: dict[str, Any] = {"gradient_checkpointing": None, "output": tmp_path / "run"}
    with pytest.raises(NothingFitsError):
        stage.train(settings(model="someone/model", **changes))
    assert hub == ["configs"]
    assert NothingFitsError.exit_code == 6


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_weights_are_fetched_when_it_is_decided(
    dtype: str, settings: Settings, hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And it is decided anew where they turn out to be in another dtype than the published ones."""
    decided = []

    def plan_blocks(*arguments: Any) -> place.Placement:
        decided.append((arguments[-1], tuple(hub)))
        return place.Placement(None)

    monkeypatch.setattr(stage, "plan_blocks", plan_blocks)
    stage.train(settings(model="someone/model", output=tmp_path / "run", steps=1, dtype=dtype))
    expected = [(torch.float32, ("configs", "weights"))]
    if dtype == "auto":
        expected.insert(0, (torch.bfloat16, ("configs",)))
    else:
        expected = [(torch.float32, ("configs",))]
    assert decided == expected
    assert hub == ["configs", "weights"]
    assert (
        read_lora_header(tmp_path / "run" / "pytorch_lora_weights.safetensors").base_model == "someone/model"
    )


def test_an_initial_lora_is_checked_before_weights_are_fetched(
    settings: Settings, hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = stage.train(settings(model="someone/model", output=tmp_path / "first", steps=1))
    hub.clear()
    shutil.rmtree(tmp_path / "snapshot")
    monkeypatch.delattr(stage, "open_accelerator")  # it does not come so far
    tensors = load_file(first.lora)
    name = next(name for name in tensors if "to_k.lora_A" in name)
    tensors[name] = torch.zeros(tensors[name].shape[0], 7)
    with safe_open(first.lora, "pt") as file:
        save_file(tensors, tmp_path / "wrong.safetensors", metadata=file.metadata())
    with pytest.raises(LoraError, match=r"at .*to_k its lora_A is"):
        stage.train(settings(model="someone/model", init_lora=tmp_path / "wrong.safetensors"))
    assert hub == ["configs"]


def test_what_is_decided_is_told(
    settings: Settings, gpu: Callable[[float], SimpleNamespace], tiny_models: Models, capsys: Any
) -> None:
    root = tiny_models("5b")
    samples: Any = SimpleNamespace(
        variant=read_variant(root), records=[SimpleNamespace(bucket=Bucket(9, 32, 48))] * 3
    )
    config = settings(gradient_checkpointing=None)
    where: Any = gpu(24)
    found = place.plan_blocks(config, where, root, samples, torch.bfloat16)
    assert found.measures == TIERS["fast"]
    assert found.forecast is not None
    assert "tier fast, about 0.0 of 24.0 GiB free" in capsys.readouterr().err
    plain = settings(memory="plain", gradient_checkpointing=None)
    where = gpu(0.0001)
    found = place.plan_blocks(plain, where, root, samples, torch.bfloat16)
    assert found.measures is None
    assert "NOTICE: that may not fit" in " ".join(capsys.readouterr().err.split())
    where.device = torch.device("cpu")
    assert place.plan_blocks(plain, where, root, samples, torch.bfloat16).forecast is None


def test_processes_decide_alike(
    gpu: Callable[[float], SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the fullest of their GPUs, and each with its share of the host."""
    where: Any = gpu(24)
    where.num_processes, where.device = 4, torch.device("cpu")
    asked = []

    def gather(mine: torch.Tensor) -> torch.Tensor:
        asked.append(mine.tolist())
        return torch.cat([mine, torch.tensor([[7 * GIB, 200 * GIB]])])

    where.gather = gather
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert place._free(where) == Need(7 * GIB, PLENTY * GIB // 2)
    assert asked == [[[24 * GIB, PLENTY * GIB // 2]]]
    where.num_processes = 1
    assert place._free(where) == Need(24 * GIB, PLENTY * GIB)


def test_the_outcome_stands_beside_what_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 4 * GIB)
    forecast = replace(forecasts(AUTO)[2], memory=Estimate({"frozen_weights": 5 * GIB}), typical_s=3.0)
    said = outcome(forecast, torch.device("cuda"), 2.0)
    assert said == (
        "GPU memory at the peak: 4.00 GiB, expected 5.00 (+25.0%); a step: 2.000 s, expected 3.000 (+50.0%)."
    )
    assert outcome(forecast, torch.device("cuda"), None).endswith("expected 5.00 (+25.0%).")


def test_a_typical_step_is_none_of_the_first(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert typical_seconds(metrics, 0) is None
    seconds = [9.0, 9.0, 40.0, 8.0, 1.0, 2.0, 90.0]
    lines: list[dict[str, object]] = [{"step": n, "seconds": s} for n, s in enumerate(seconds, 1)]
    lines.insert(5, {"step": 5, "validation": {}})
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert typical_seconds(metrics, 2) == 2.0
    assert typical_seconds(metrics, 6) is None
