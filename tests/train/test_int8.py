"""The base in 8 bits: what it costs, that it is what is computed with, and that nothing of it is ever there whole.

Mutations tried, each caught: a scale for a whole row; rounding down; rounding in the given matrix itself; the first
block's weights in every block; a block's weights not made anew; norms rounded, too; all weights read before any is
rounded; zeros where nothing is held; 8 bits not written down, or not compared when a run goes on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_kit import ATTENTION, CASE_NAMES, CASES, CPU, gradients, rounded, values_in, with_lora
from safetensors.torch import load_file
from torch import nn

from cogcache.config import TrainConfig
from cogcache.errors import ConfigError, MismatchError
from cogcache.int8 import int8_size, put_in_int8, quantize, values_of
from cogcache.tiny import Family
from cogcache.train import train, weights
from cogcache.train.memory.blocks import install
from cogcache.train.memory.measures import TINY, Measures
from cogcache.train.model import load_transformer
from cogcache.train.weights import read_weights

Settings = Callable[..., TrainConfig]
Models = Callable[[Family], Path]

HOMES = [
    Measures(storage="int8"),
    Measures(storage="int8", weights="host"),
    replace(TINY[-1], compile=False),
]


@pytest.mark.parametrize("shape", [(64, 256), (3, 96), (5, 7), (1, 1)])
def test_values_are_off_by_half_a_step_at_most(shape: tuple[int, int]) -> None:
    matrix = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-6, 3, shape[0])[:, None]
    )
    found = quantize(matrix)
    assert found.steps.dtype == torch.int8
    steps, scales = int8_size(matrix)
    assert (found.steps.numel(), 4 * found.scales.numel()) == (steps, scales)
    runs = matrix.reshape(found.steps.shape)
    wrong = (values_in(found).view_as(runs) - runs).abs()
    assert bool((wrong <= 0.501 * found.scales).all())
    assert torch.equal(found.steps.abs().amax(dim=1), torch.full((len(runs),), 127, dtype=torch.int8))
    assert shape[-1] % found.steps.shape[-1] == 0  # no run goes over a row's end


def test_of_normal_values_a_hundredth_and_less_is_lost() -> None:
    """0.6%, as the module says; bfloat16 itself rounds by 0.17%."""
    matrix = torch.randn(256, 3072, generator=torch.Generator().manual_seed(0))
    wrong = float((values_in(quantize(matrix)) - matrix.view(-1)).norm() / matrix.norm())
    assert 0.0055 < wrong < 0.0065
    half = values_in(quantize(matrix.bfloat16()), torch.bfloat16)
    assert float((half - matrix.view(-1)).norm() / matrix.norm()) < 0.007
    steps, scales = int8_size(matrix)
    assert (steps + scales) / matrix.numel() * 8 == 8.25


def test_nothing_and_whole_steps_stay_what_they_are() -> None:
    assert not values_in(quantize(torch.zeros(4, 128))).any()
    exact = torch.randint(-127, 128, (8, 128), generator=torch.Generator().manual_seed(0)).float()
    exact[:, 0] = 127
    assert torch.equal(values_in(quantize(exact * 0.5)), exact.view(-1) * 0.5)


def test_a_parameter_keeps_its_shape_and_holds_nothing() -> None:
    parameter = nn.Parameter(torch.randn(6, 32, dtype=torch.bfloat16), requires_grad=False)
    expected = quantize(parameter.data)
    for _ in range(2):  # the second time changes nothing
        put_in_int8(parameter, CPU)
        assert (parameter.shape, parameter.dtype) == ((6, 32), torch.bfloat16)
        assert bool(parameter.isnan().all())
        assert parameter.untyped_storage().nbytes() == 2
        found = values_of(parameter)
        assert found is not None
        assert torch.equal(found.steps, expected.steps)
        assert torch.equal(found.scales, expected.scales)
    assert values_of(nn.Parameter(torch.ones(2, 2))) is None


@pytest.mark.parametrize(("family", "targets"), CASES, ids=CASE_NAMES)
def test_gradients_are_those_of_a_model_that_was_rounded(
    family: Family, targets: list[str], tiny_models: Models
) -> None:
    """To the bit where a LoRA is on attention alone, as without rounding; wherever the 8 bits are."""
    root = tiny_models(family)
    expected_losses, expected = gradients(rounded(with_lora(root, targets)), root, 2)
    _, whole = gradients(with_lora(root, targets), root, 2)
    moved = [float((expected[name] - grad).norm() / grad.norm()) for name, grad in whole.items()]
    assert 1e-3 < max(moved) < 0.1
    for measures in HOMES:
        transformer = with_lora(root, targets)
        install(transformer, measures, CPU)
        frozen = [p for p in transformer.transformer_blocks.parameters() if not p.requires_grad]
        assert all(bool(p.isnan().all()) == (p.ndim == 2) for p in frozen)
        found_losses, found = gradients(transformer, root, 2)
        assert all(map(torch.equal, found_losses, expected_losses))
        for name, grad in found.items():
            if targets == ATTENTION and not measures.in_parts:
                assert torch.equal(grad, expected[name]), name
            else:
                torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
        assert all(bool(p.isnan().all()) == (p.ndim == 2) for p in frozen)  # and nothing was left behind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_matrix_is_rounded_as_soon_as_it_is_read(
    dtype: torch.dtype, tiny_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_models("5b")
    whole, put_there = load_transformer(root, dtype), list[nn.Parameter]()
    read, read_one = list[Any](), weights._Reader.read
    holding, waiting = list[int](), list[int]()

    def reading(*arguments: Any) -> torch.Tensor:
        tensor = read_one(*arguments)
        if tensor.ndim == 2:
            read.append(weakref.ref(tensor))
        return tensor

    def put(parameter: nn.Parameter, home: torch.device) -> None:
        put_there.append(parameter)
        holding.append(sum(not p.isnan().any() for p in put_there))
        waiting.append(sum(tensor() is not None for tensor in read[:]))
        put_in_int8(parameter, home)

    monkeypatch.setattr(weights._Reader, "read", reading)
    monkeypatch.setattr("cogcache.train.model.put_in_int8", put)
    loaded = load_transformer(root, dtype, int8_home=CPU)
    others = sum(
        p.ndim == 2 and not name.startswith("transformer_blocks.") for name, p in whole.named_parameters()
    )
    assert set(holding) == {1}  # all that came before have let go of their values
    assert max(waiting) <= others + weights._THREADS
    names = dict(whole.named_parameters())
    matrices = {name for name, p in names.items() if p.ndim == 2 and name.startswith("transformer_blocks.")}
    assert len(matrices) == len(put_there) > 2 * weights._THREADS
    for name, parameter in loaded.named_parameters():
        found = values_of(parameter)
        assert (found is not None) == (name in matrices), name
        assert not parameter.requires_grad
        if found is None:
            assert torch.equal(parameter, names[name])
        else:
            expected = quantize(names[name].data)
            assert torch.equal(found.steps, expected.steps)
            assert torch.equal(found.scales, expected.scales)


def test_what_is_kept_of_a_tensor_is_asked_one_at_a_time(tiny_models: Models) -> None:
    inside, asked = [0], list[str]()

    def keep(name: str, tensor: torch.Tensor) -> torch.Tensor:
        inside[0] += 1
        assert inside[0] == 1
        asked.append(name)
        inside[0] -= 1
        return tensor[:0]

    found = read_weights(tiny_models("2b") / "transformer", torch.float32, keep=keep)
    assert sorted(found) == sorted(asked)
    assert not any(tensor.numel() and tensor.ndim for tensor in found.values())


def test_whole_runs(settings: Settings, metrics: Any, tmp_path: Path) -> None:
    """Asked for or not, 8 bits are written down; such a run goes on as such, under any tier, and only as such."""
    common = {
        "gradient_checkpointing": None,
        "compile": False,
        "in_parts": False,
        "checkpoint_every": 2,
        "lr": 1e-3,
    }
    whole = train(settings(**common, steps=4, memory="tiny", output=tmp_path / "whole"))
    small = train(settings(**common, steps=4, memory="small", base_storage="int8", output=tmp_path / "int8"))
    assert "base_storage: int8" in (tmp_path / "int8" / "config.yaml").read_text("utf-8")
    begun, rounded_begun = metrics(whole.output)[0]["loss"], metrics(small.output)[0]["loss"]
    assert begun != rounded_begun
    assert begun == pytest.approx(rounded_begun, rel=0.01)
    parts = {**common, "output": tmp_path / "parts"}
    train(settings(**parts, steps=2, memory="balanced", base_storage="int8"))
    with pytest.raises(MismatchError) as caught:
        train(settings(**parts, steps=4, memory="tiny", resume="latest"))
    assert list(caught.value.differences) == ["base_storage"]
    done = train(settings(**parts, steps=4, memory="tiny", base_storage="int8", resume="latest"))
    assert done.lora.read_bytes() == small.lora.read_bytes()
    assert load_file(done.lora).keys() == load_file(whole.lora).keys()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"memory": "plain", "base_storage": "int8"}, ConfigError, "--base-storage"),
        ({"memory": "plain", "in_parts": True}, ConfigError, "--in-parts"),
        ({"memory": "small", "base_storage": "int8", "dora": True}, ValueError, "--dora"),
        ({"memory": "small", "gradient_checkpointing": False}, ConfigError, "block by block"),
        ({"memory": "fast", "base_storage": "int8"}, ConfigError, "block by block"),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: Settings, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(settings(**{"gradient_checkpointing": None, **changes}))
