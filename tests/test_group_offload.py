"""What diffusers' group offloading does to a backward pass, with a second device made up on the CPU.

On that device weights are copies; those that are offloaded read as NaN, where a GPU would refuse to compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading
from torch import Tensor, nn

from cogcache.bench import group_offload
from cogcache.bench.group_offload import Level, offload_groups
from cogcache.bench.train import RowSettings, _forward
from cogcache.config import TrainConfig
from cogcache.tiny import Family
from cogcache.train.model import add_lora, load_transformer, trainable
from cogcache.variants import read_variant

CPU = torch.device("cpu")


class Device:
    """What is on it, by the parameter; for diffusers also the stream on which it is fetched ahead."""

    def __init__(self) -> None:
        self.home: dict[nn.Parameter, Tensor] = {}
        self.there: set[nn.Parameter] = set()

    def onload(self, group: Any) -> None:
        for parameter in self._of(group):
            parameter.data = self.home[parameter].clone()
            self.there.add(parameter)

    def offload(self, group: Any) -> None:
        for parameter in self._of(group):
            parameter.data = torch.full_like(self.home[parameter], float("nan"))
            self.there.discard(parameter)

    def _of(self, group: Any) -> list[nn.Parameter]:
        found = [*(p for module in group.modules for p in module.parameters()), *group.parameters]
        self.home |= {p: p.data.clone() for p in found if p not in self.home}
        return found

    def synchronize(self) -> None:
        """Everything is done at once."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made, apply = Device(), group_offloading._apply_group_offloading

    def with_stream(module: nn.Module, config: Any) -> None:
        apply(module, replace(config, stream=made, low_cpu_mem_usage=True))

    monkeypatch.setattr(group_offloading, "_apply_group_offloading", with_stream)
    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", lambda group: made.onload(group))
    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", lambda group: made.offload(group))
    return made


def _steps(root: Path, level: Level | None, dtype: torch.dtype, *, count: int = 3) -> list[dict[str, Tensor]]:
    """The gradients of some steps, with every weight as it is."""
    transformer, variant = load_transformer(root, dtype), read_variant(root)
    if level is not None:
        offload_groups(transformer, level, CPU)
    add_lora(transformer, TrainConfig(shards=Path("unused"), rank=4))
    draws = torch.Generator().manual_seed(0)
    for parameter in trainable(transformer).values():
        parameter.data = torch.randn(parameter.shape, generator=draws) * 0.02
    transformer.enable_gradient_checkpointing()
    forward = _forward(transformer, variant, RowSettings("", "5b", "17x64x96", 1, 4, 1), CPU)
    found = []
    for _ in range(count):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = forward()
        torch.autograd.backward(loss)
        found.append(
            {name: p.grad.clone() for name, p in trainable(transformer).items() if p.grad is not None}
        )
        transformer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["5b", "1.5-5b-i2v"])
def test_leaf_level_has_the_same_gradients(
    family: Family, dtype: torch.dtype, device: Device, tiny_models: Callable[[Family], Path]
) -> None:
    root = tiny_models(family)
    (expected,) = _steps(root, None, dtype, count=1)
    assert expected
    for found in _steps(root, "leaf_level", dtype):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    there = sum(p.numel() for p in device.there) / sum(p.numel() for p in device.home)
    assert there < 0.2


@pytest.mark.usefixtures("device")
def test_without_aliases_the_backward_pass_reads_what_is_offloaded(
    tiny_models: Callable[[Family], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_offload, "alias_norm_weights", lambda _model: None)
    (found,) = _steps(tiny_models("5b"), "leaf_level", torch.float32, count=1)
    assert all(gradient.isnan().any() for gradient in found.values())


def test_block_level_leaves_all_blocks_on_the_device(
    device: Device, tiny_models: Callable[[Family], Path]
) -> None:
    """The made-up device lets it have a LoRA; diffusers' own lists of copies do not."""
    _steps(tiny_models("5b"), "block_level", torch.float32, count=1)
    there = sum(p.numel() for p in device.there) / sum(p.numel() for p in device.home)
    assert there > 0.9
