"""DeepSpeed ZeRO over two processes: the numbers of one plain process, and the same checkpoints.

Mutations tried, each caught: moments or step count not put back; DeepSpeed's own copy of the weights left as it
was; every microbatch taken as the end of a step; its clipping
left at its default.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogcache.config import TrainConfig
from cogcache.errors import ConfigError
from cogcache.geometry import Size
from cogcache.train import train
from cogcache.train.zero import check_deepspeed

Settings = Callable[..., TrainConfig]
CHECKPOINT = "checkpoint-000002"


def launch(stage: int) -> dict[str, str]:
    """What ``accelerate launch --use_deepspeed --zero_stage N`` sets."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_USE_CPU": "false",
        "DS_ACCELERATOR": "cpu",
    }


def assert_near(ours: Path, theirs: Path) -> None:
    """Equal tensors in two folders, up to the order of float additions."""
    names = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    assert names == sorted(path.relative_to(ours) for path in ours.rglob("*.safetensors"))
    for name in names:
        first, second = load_file(ours / name), load_file(theirs / name)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            torch.testing.assert_close(tensor, second[key], rtol=1e-3, atol=1e-6)


def assert_same_numbers(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for first, second in zip(ours, theirs, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)
        assert [s["id"] for s in first["samples"]] == [s["id"] for s in second["samples"]]


@pytest.fixture
def common(make_cache: Any) -> dict[str, Any]:
    """Steps of four samples and of one, so that a process has nothing but a filler; clipped."""
    shards = make_cache("2b", [(9, Size(32, 48))] * 5)
    return {"shards": shards, "steps": 4, "eps": 1e-3, "checkpoint_every": 2, "max_grad_norm": 1e-3}


def test_a_lora_under_zero_2_equals_one_process_and_goes_on_either_way(
    settings: Settings, common: dict[str, Any], train_server: Any, tmp_path: Path, metrics: Any
) -> None:
    plain = train(settings(output=tmp_path / "plain", grad_accum=4, **common)).output
    zero = settings(output=tmp_path / "zero", grad_accum=2, **common)
    codes, _ = train_server.run(zero, processes=2, environment=launch(2))
    assert codes == [0, 0], train_server.log.read_text()
    assert_same_numbers(metrics(tmp_path / "zero"), metrics(plain))
    assert_near(tmp_path / "zero", plain)

    onward = settings(
        output=tmp_path / "onward", grad_accum=4, resume=str(tmp_path / "zero" / CHECKPOINT), **common
    )
    assert_near(train(onward).output / "checkpoint-000004", plain / "checkpoint-000004")
    back = zero.model_copy(update={"output": tmp_path / "back", "resume": str(plain / CHECKPOINT)})
    codes, _ = train_server.run(back, processes=2, environment=launch(2))
    assert codes == [0, 0], train_server.log.read_text()
    assert_near(tmp_path / "back" / "checkpoint-000004", plain / "checkpoint-000004")


def test_all_weights_under_zero_1_equal_one_process(
    common: dict[str, Any], train_server: Any, tmp_path: Path, metrics: Any
) -> None:
    values = {**common, "training_type": "full", "device": "cpu", "lr": 1e-3, "gradient_checkpointing": True}
    plain = train(TrainConfig(output=tmp_path / "plain", grad_accum=4, **values)).output
    zero = TrainConfig(output=tmp_path / "zero", grad_accum=2, **values)
    codes, _ = train_server.run(zero, processes=2, environment=launch(1))
    assert codes == [0, 0], train_server.log.read_text()
    assert_same_numbers(metrics(tmp_path / "zero"), metrics(plain))
    assert_near(tmp_path / "zero", plain)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage 3 is not supported"),
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0 is not supported"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"bf16": {"enabled": True}}, "precision is chosen by --dtype"),
        ({"optimizer": {"type": "AdamW"}}, "the optimizer is chosen by cogcache's flags"),
        ({"scheduler": {"type": "WarmupLR"}}, "the scheduler is chosen by cogcache's flags"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], reason: str) -> None:
    check_deepspeed({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}})
    with pytest.raises(ConfigError, match=reason):
        check_deepspeed({"zero_optimization": {"stage": 2}, **change})


def test_zero_3_is_refused_by_a_launch(settings: Settings, train_server: Any, tmp_path: Path) -> None:
    codes, _ = train_server.run(settings(), environment={**launch(3), "RANK": "0", "LOCAL_RANK": "0",
        "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})  # fmt: skip
    assert codes == [2], train_server.log.read_text()
    assert "ConfigError: DeepSpeed ZeRO stage 3 is not supported" in train_server.log.read_text()
    assert not (tmp_path / "run").exists()
