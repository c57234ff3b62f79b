"""Memory measures change where things are kept, never what is computed.

On the CPU all arithmetic in float32 is the same, so losses, gradients and whole runs are compared bit for bit with
diffusers' own blocks; for bfloat16 see ``test_memory_precision``. Mutations tried, each caught: gradients of a
block's two parts not added; the weights of another block used; key and value exchanged in attention's backward pass;
the last projection skipped where it is trained; the wrong gate on the text's gradient; the optimizer's step count not
kept, or its moments; rotary tables of the first bucket kept for the second; the rotary sign exchanged; the LoRA's
scale dropped; its A detached; a kept attention output 1% too large, or with its heads shifted; a kept log-sum-exp
rounded. What streams and events do is not seen on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_kit import ATTENTION, CASE_NAMES, CASES, CPU, EVERYWHERE, FAMILIES, gradients, losses, with_lora
from safetensors.torch import load_file
from torch import Tensor

from cogcache.config import TrainConfig
from cogcache.errors import ConfigError
from cogcache.geometry import Size
from cogcache.streamed import CopyStreams
from cogcache.tiny import Family
from cogcache.train import train
from cogcache.train.engine import PlainEngine
from cogcache.train.memory import place
from cogcache.train.memory.blocks import BlockRunner, install
from cogcache.train.memory.host import HostPool
from cogcache.train.memory.measures import TIERS, Measures
from cogcache.train.memory.stock import compile_blocks
from cogcache.train.model import trainable

Settings = Callable[..., TrainConfig]
Models = Callable[[Family], Path]

MEASURES = {
    "recompute all": Measures(),
    "keep all": Measures(recompute=False),
    "attention on the device": Measures(attention="device"),
    "inputs on the host": Measures(inputs="host"),
    "weights on the host": Measures(weights="host"),
    "all on the host": Measures(attention="host", inputs="host", weights="host"),
    "in parts": Measures(in_parts=True),
    "in parts, attention kept": Measures(attention="device", in_parts=True),
}


COMPILING = pytest.mark.filterwarnings("ignore")
"""torch's compiler warns of what torch itself does; as errors these would end it."""


@pytest.mark.parametrize(("family", "targets"), CASES, ids=CASE_NAMES)
def test_gradients_are_those_of_the_stock_blocks(
    family: Family, targets: list[str], tiny_models: Models
) -> None:
    root = tiny_models(family)
    expected_losses, expected = gradients(with_lora(root, targets), root, 2)
    assert len(expected) == len(trainable(with_lora(root, targets)))
    for name, measures in MEASURES.items():
        transformer = with_lora(root, targets)
        install(transformer, measures, CPU)
        found_losses, found = gradients(transformer, root, 2)
        assert all(map(torch.equal, found_losses, expected_losses)), name
        assert found.keys() == expected.keys()
        for parameter, grad in found.items():
            if targets == ATTENTION and not measures.in_parts:
                assert torch.equal(grad, expected[parameter]), (name, parameter)
            else:  # gradients that parts of a block share are added in another order
                torch.testing.assert_close(grad, expected[parameter], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("targets", [ATTENTION, EVERYWHERE], ids=["attention", "everywhere"])
def test_in_parts_half_of_the_tokens_are_at_work_at_once(targets: list[str], tiny_models: Models) -> None:
    """In the feed-forward, with a gradient and without."""
    root, rows = tiny_models("5b"), dict[bool, list[int]]()
    for in_parts in (False, True):
        transformer = with_lora(root, targets)
        install(transformer, Measures(in_parts=in_parts), CPU)
        found = rows[in_parts] = list[int]()
        for block in transformer.transformer_blocks:
            block.ff.net[0].register_forward_hook(
                lambda _module, given, _out, found=found: found.append(given[0].shape[:-1].numel())
            )
        gradients(transformer, root, 1)
        with torch.no_grad():
            list(losses(transformer, root, 1))
    assert len(set(rows[False])) == 1
    assert max(rows[True]) == -(-rows[False][0] // 2)
    assert sum(rows[True]) == sum(rows[False])


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_are_the_same(
    family: Family,
    settings: Settings,
    make_cache: Callable[..., Path],
    metrics: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole runs with accumulation, batches of two buckets and validation in between: the loss of every sample, every
    gradient of every step, and the LoRA.

    All of it bit for bit, also where weights come from the host; but for a block's work in parts. Products may round
    differently where weights begin at another address, but those that are loaded and those that are streamed all begin
    at multiples of 64 bytes.
    """
    batch, clips = 2, [(9, Size(32, 48))] * 3 + [(17, Size(32, 48))] * 2
    if family == "5b-i2v":  # whose learned positions are of one size, which costs more
        batch, clips = 1, [(17, Size(64, 96))] * 3
    common = {"shards": make_cache(family, clips), "steps": 20, "batch_size": batch, "grad_accum": 2}
    common |= {"gradient_checkpointing": None, "holdout": "20%", "validate_every": 10, "rank": 4, "lr": 1e-3}
    grads, installed = list[dict[str, Tensor]](), list[Measures]()
    update, install_blocks = PlainEngine.step, place.install

    def step(engine: PlainEngine, *rest: Any) -> Any:
        grads.append({name: p.grad.clone() for name, p in engine.parameters.items() if p.grad is not None})
        return update(engine, *rest)

    def installing(transformer: Any, measures: Measures, *rest: Any) -> Any:
        installed.append(measures)
        return install_blocks(transformer, measures, *rest)

    monkeypatch.setattr(PlainEngine, "step", step)
    monkeypatch.setattr(place, "install", installing)

    def run(tier: str, **extra: Any) -> tuple[Any, list[dict[str, Tensor]], dict[str, Tensor]]:
        grads.clear()
        result = train(settings(**common, memory=tier, **{"output": tmp_path / tier, **extra}))
        return metrics(result.output), [*grads], load_file(result.lora)

    lines, expected, lora = run("plain")
    steps = [line for line in lines if "grad_norm" in line]
    assert len(steps) == len(expected) == 20
    assert max(len(line["samples"]) for line in steps) > batch  # in several microbatches
    assert {len(step) for step in expected} == {len(lora)}
    assert all(tensor.any() for step in expected[1:] for tensor in step.values())  # B is zero in the first
    for tier in TIERS:  # in parts some sums have another order
        found_lines, found, found_lora = run(tier, compile=False, in_parts=False)
        assert found_lines == lines, tier
        for number, (step_found, step_expected) in enumerate(zip(found, expected, strict=True), 1):
            assert step_found.keys() == step_expected.keys()
            for name, grad in step_found.items():
                assert torch.equal(grad, step_expected[name]), (tier, number, name)
        assert found_lora.keys() == lora.keys()
        assert all(torch.equal(tensor, lora[name]) for name, tensor in found_lora.items()), tier
    assert installed == [replace(measures, compile=False, in_parts=False) for measures in TIERS.values()]
    in_parts_lines, _, in_parts = run("tiny", compile=False, output=tmp_path / "in parts")
    assert installed[-1] == replace(TIERS["tiny"], compile=False)
    for line, expected_line in zip(in_parts_lines, lines, strict=True):
        assert line.keys() == expected_line.keys()
        if "loss" in line:
            assert line["loss"] == pytest.approx(expected_line["loss"], rel=1e-5)
    for name, tensor in lora.items():
        torch.testing.assert_close(in_parts[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_under_another_tier(settings: Settings, tmp_path: Path) -> None:
    common = {"checkpoint_every": 2, "gradient_checkpointing": None, "compile": False, "in_parts": False}
    whole = train(settings(**common, steps=6, memory="small", output=tmp_path / "whole"))
    part = {**common, "output": tmp_path / "parts"}
    train(settings(**part, steps=2, memory="tiny"))
    train(settings(**part, steps=4, memory="small", resume="latest"))
    done = train(settings(**part, steps=6, memory="tiny", resume="latest"))
    assert done.lora.read_bytes() == whole.lora.read_bytes()


@pytest.mark.slow
@COMPILING
def test_compiled_blocks_differ_by_rounding_only(tiny_models: Models) -> None:
    root = tiny_models("5b")
    _, expected = gradients(with_lora(root, ATTENTION), root, 2)
    for measures in (TIERS["fast"], TIERS["small"]):
        transformer = with_lora(root, ATTENTION)
        install(transformer, measures, CPU)
        _, found = gradients(transformer, root, 2)
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stock_blocks_run_compiled_in_training_alone(
    tiny_models: Models, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """What is compiled is each block's own forward, once a pass; the compiler here only looks on."""
    root = tiny_models("5b")
    plain, transformer = (with_lora(root, ATTENTION) for _ in range(2))
    for model in (plain, transformer):
        model.train()
        model.enable_gradient_checkpointing() if checkpointing else None
    _, expected = gradients(plain, root, 2)
    runs = []

    def compiler(forward: Any, *, dynamic: bool) -> Any:
        assert dynamic is False
        return lambda *inputs, **named: (runs.append(forward), forward(*inputs, **named))[1]

    monkeypatch.setattr(torch, "compile", compiler)
    compile_blocks(transformer)
    _, found = gradients(transformer, root, 2)
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())
    blocks = len(transformer.transformer_blocks)
    assert len(set(runs)) == blocks
    assert len(runs) == 2 * blocks * (2 if checkpointing else 1)
    with torch.no_grad():
        list(losses(transformer, root, 1))
    transformer.eval()
    list(losses(transformer, root, 1))
    assert len(runs) == 2 * blocks * (2 if checkpointing else 1)


@pytest.mark.slow
@COMPILING
def test_stock_blocks_really_compiled_differ_by_rounding_only(tiny_models: Models) -> None:
    root = tiny_models("5b")
    plain, transformer = (with_lora(root, ATTENTION) for _ in range(2))
    _, expected = gradients(plain.train(), root, 2)
    compile_blocks(transformer.train())
    _, found = gradients(transformer, root, 2)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


def test_without_gradient_the_model_is_the_same(tiny_models: Models) -> None:
    root = tiny_models("5b")
    with torch.no_grad():
        (expected,) = losses(with_lora(root, ATTENTION), root, 1)
        for measures in MEASURES.values():
            transformer = with_lora(root, ATTENTION)
            install(transformer, measures, CPU)
            (found,) = losses(transformer, root, 1)
            assert torch.equal(found, expected)


def test_host_weights_leave_nothing_behind_and_lose_nothing(tiny_models: Models) -> None:
    root = tiny_models("5b")
    transformer = with_lora(root, ATTENTION)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    install(transformer, MEASURES["all on the host"], CPU)
    gradients(transformer, root, 2)
    after = transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_forward_pass_without_backward_does_no_harm(tiny_models: Models) -> None:
    """An exception between forward and backward, then the next step."""
    root = tiny_models("5b")
    _, expected = gradients(with_lora(root, ATTENTION), root, 1)
    transformer = with_lora(root, ATTENTION)
    install(transformer, MEASURES["all on the host"], CPU)
    list(losses(transformer, root, 1))
    _, found = gradients(transformer, root, 1)
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())


def test_the_pool_reuses_buffers_and_keeps_odd_layouts() -> None:
    pool = HostPool(CopyStreams(CPU))
    base = torch.randn(3, 8, 5)
    for tensor in (base.transpose(0, 2), base[:, 2:6], base.to(torch.bfloat16), base[0, 0]):
        assert torch.equal(pool.get(pool.put(tensor)), tensor)
    taken = pool.bytes
    kept = [pool.put(base), pool.put(base + 1)]
    assert pool.bytes == taken + base.nbytes  # one of the two sizes had a free buffer of its own
    assert torch.equal(pool.get(kept[1]), base + 1)
    assert torch.equal(pool.get(kept[0]), base)
    for _ in range(3):
        pool.get(pool.put(base))
    assert pool.bytes == taken + base.nbytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "small", "lora_dropout": 0.1}, "--lora-dropout"),
        ({"memory": "plain", "base_weights": "host"}, "--base-weights"),
        ({"memory": "auto", "keep_inputs": "host"}, "--keep-inputs"),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: Settings, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(settings(gradient_checkpointing=None, **changes))


def test_the_runner_is_what_runs(tiny_models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all of the above would compare the stock blocks with themselves."""
    calls = []
    forward = BlockRunner.forward
    monkeypatch.setattr(
        BlockRunner, "forward", lambda self, index, *rest: calls.append(index) or forward(self, index, *rest)
    )
    root = tiny_models("5b")
    transformer = with_lora(root, ATTENTION)
    install(transformer, MEASURES["recompute all"], CPU)
    gradients(transformer, root, 1)
    assert calls == [0, 1, 2]
