"""The host reads a step's numbers when the next step is on its way, and nothing is lost by it.

Mutations tried, each caught: the flag of a bad step forgotten in the next; the update done all the same; the loss not
looked at before the update; a step read before the next is launched; the last step never read; an error over a batch
raised before the steps in front of it are finished; the loss scale not shrunk; an overflow taken for an error.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cogcache.config import TrainConfig
from cogcache.errors import CacheError, NonFiniteError, StoppedError
from cogcache.geometry import Size
from cogcache.tiny import build_tiny_model
from cogcache.train import engine as engines
from cogcache.train import train
from cogcache.train.clock import StepClock
from cogcache.train.data import Batch, Samples
from cogcache.train.late import LateNumbers, Uploads
from cogcache.train.loop import Trainer
from cogcache.train.optimizer import load_optimizer_state, make_optimizer, optimizer_state, update_unless
from cogcache.train.report import Report

Settings = Callable[..., TrainConfig]
CPU = torch.device("cpu")


def state_of(trainer: Trainer) -> list[Tensor]:
    """All that an update changes, copied."""
    weights = [p for p in trainer.transformer.parameters() if p.requires_grad]
    return [tensor.detach().clone() for tensor in (*weights, *trainer.engine.state().values())]


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """What weights and optimizer hold after each step that was launched."""
    kept: dict[int, list[Tensor]] = {}
    launch = Trainer._launch

    def launched(self: Trainer, plan: Any, *rest: Any) -> Any:
        step = launch(self, plan, *rest)
        kept[plan.number] = state_of(self)
        return step

    monkeypatch.setattr(Trainer, "_launch", launched)
    return kept


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("memory", ["plain", "tiny"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_none_stops_all_updates_from_its_step_on(
    settings: Settings, metrics: Any, monkeypatch: pytest.MonkeyPatch, states: Any, what: str, memory: str
) -> None:
    backward = Trainer._backward

    def broken(self: Trainer, loss_b: Tensor, *rest: Any) -> None:
        backward(self, loss_b * (float("nan") if len(states) == 2 else 1.0), *rest)

    forward = Trainer._forward

    def poisoned(self: Trainer, batch: Batch, step: int, micro: int) -> Tensor:
        return forward(self, batch, step, micro) + (float("inf") if step == 3 else 0.0)

    name, replacement = ("_forward", poisoned) if what == "loss" else ("_backward", broken)
    monkeypatch.setattr(Trainer, name, replacement)
    config = settings(steps=6, memory=memory, checkpoint_every=2)
    if memory == "tiny":
        config = config.model_copy(update={"compile": False, "gradient_checkpointing": None})
    with pytest.raises(NonFiniteError, match=f"the {what} of step 3 is not a number") as caught:
        train(config)
    assert ("clip-" in caught.value.message) == (what == "loss")
    assert sorted(states) == [1, 2, 3, 4]
    assert not equal(states[1], states[2])
    assert equal(states[2], states[3])
    assert equal(states[2], states[4])
    assert [line["step"] for line in metrics(config.output)] == [1, 2]
    assert [path.name for path in config.output.glob("checkpoint-*")] == ["checkpoint-000002"]


def test_a_step_is_read_while_the_next_one_runs(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    launch, read = Trainer._launch, LateNumbers.read

    def launched(self: Trainer, plan: Any, *rest: Any) -> Any:
        step = launch(self, plan, *rest)
        events.append(f"launch {plan.number}")
        return step

    def reading(self: LateNumbers) -> list[float]:
        events.append("read")
        return read(self)

    monkeypatch.setattr(Trainer, "_launch", launched)
    monkeypatch.setattr(LateNumbers, "read", reading)
    assert train(settings(steps=4)).loss
    one, two, three, four = (f"launch {number}" for number in (1, 2, 3, 4))
    assert events == [one, two, "read", three, "read", four, "read", "read"]


def test_what_cannot_be_read_stops_after_the_steps_before_it(
    settings: Settings, metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, calls = Samples.batch, []

    def failing(self: Samples, *args: Any, **options: Any) -> Batch:
        calls.append(args)
        if len(calls) == 4:
            raise CacheError("a shard is damaged.")
        return batch(self, *args, **options)

    monkeypatch.setattr(Samples, "batch", failing)
    config = settings(steps=6, checkpoint_every=2)
    with pytest.raises(CacheError, match="damaged"):
        train(config)
    assert [line["step"] for line in metrics(config.output)] == [1, 2, 3]
    assert (config.output / "checkpoint-000002").is_dir()


def test_of_several_processes_all_stop_after_the_same_step(
    settings: Settings, metrics: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The signal comes while step 2 runs, travels with the losses of step 3, and is read while step 4 runs."""
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "gather", lambda _, row: torch.cat([row, row]))
    whole = train(settings(output=tmp_path / "whole", steps=6))
    report = Report.step

    def step(self: Report, plan: Any, result: Any) -> None:
        report(self, plan, result)
        if plan.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = settings(output=tmp_path / "stopped", steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(Report, "step", step)
        with pytest.raises(StoppedError, match="after step 4 of 6"):
            train(stopped)
    resumed = train(stopped.model_copy(update={"resume": "latest"}))
    assert resumed.lora.read_bytes() == whole.lora.read_bytes()
    assert metrics(resumed.output) == metrics(whole.output)


def test_an_overflow_of_float16_leaves_one_update_out_and_shrinks_the_scale(
    settings: Settings,
    make_cache: Any,
    metrics: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    states: Any,
) -> None:
    backward, scales = Trainer._backward, []

    def broken(self: Trainer, loss_b: Tensor, *rest: Any) -> None:
        scales.append(self.engine.scaler_state()["scale"])
        backward(self, loss_b * (1e38 if len(states) == 1 else 1.0), *rest)

    monkeypatch.setattr(Trainer, "_backward", broken)
    model = build_tiny_model(tmp_path / "model", "2b", dtype="float16")
    result = train(settings(shards=make_cache("2b"), model=str(model), steps=4))
    assert equal(states[1], states[2])
    assert not equal(states[2], states[3])
    norms = [line["grad_norm"] for line in metrics(result.output)]
    assert [norm is None for norm in norms] == [False, True, False, False]
    assert scales[2:] == [scales[1] / 2] * 2


@pytest.mark.parametrize("on_host", [False, True])
def test_a_fused_update_is_left_out_by_a_flag_that_only_its_kernel_reads(
    settings: Settings, on_host: bool
) -> None:
    """As on a GPU: the CPU has torch's fused kernel, too. Its results are those of the plain one but for rounding."""
    ends: list[dict[str, Tensor]] = []
    for fused in (True, False):
        torch.manual_seed(0)
        weights = {name: torch.nn.Parameter(torch.randn(5)) for name in ("a", "b")}
        optimizer = make_optimizer(settings(), weights, on_host=on_host, fused=fused)
        for skip in (False, True, False):
            for weight in weights.values():
                weight.grad = torch.full_like(weight, torch.nan) if skip else torch.randn_like(weight)
            before = {**weights, **optimizer_state(optimizer, weights)}
            before = {name: tensor.detach().clone() for name, tensor in before.items()}
            flag = torch.tensor(skip)
            with Reads() as reads:
                update_unless(optimizer, flag)
            assert not (fused and reads.found)
            after = {**weights, **optimizer_state(optimizer, weights)}
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) == skip
        assert all(value == 2 for name, value in after.items() if name.endswith(".step"))
        again = make_optimizer(settings(), weights, on_host=on_host, fused=fused)
        load_optimizer_state(again, weights, optimizer_state(optimizer, weights))
        assert equal(
            [*optimizer_state(again, weights).values()], [*optimizer_state(optimizer, weights).values()]
        )
        ends.append({name: tensor.detach().clone() for name, tensor in after.items()})
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-5, atol=1e-7)


class Reads(TorchDispatchMode):
    """Counts operations for which the host must wait for a GPU, or that bring a constant of the host's to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["2b", "5b", "5b-i2v", "1.5-5b-i2v"])
@pytest.mark.parametrize("memory", ["plain", "small"])
def test_within_a_step_nothing_is_read_and_no_constant_is_made(
    settings: Settings, make_cache: Any, monkeypatch: pytest.MonkeyPatch, family: Any, memory: str
) -> None:
    """But for the update: on a CPU it reads its flag and counts its steps there."""
    found: dict[int, list[str]] = {}
    launch = Trainer._launch

    def launched(self: Trainer, plan: Any, uploads: Any, stop: Any) -> Any:
        uploads.ahead()  # reading a sample is the host's business
        monkeypatch.setattr(uploads, "ahead", lambda: None)
        with Reads() as reads:
            step = launch(self, plan, uploads, stop)
        monkeypatch.undo()
        patch()
        found[plan.number] = reads.found
        return step

    def patch() -> None:
        monkeypatch.setattr(engines, "update_unless", lambda *_: None)
        monkeypatch.setattr(Trainer, "_launch", launched)

    patch()
    extra = {} if memory == "plain" else {"compile": False, "gradient_checkpointing": None}
    clips = [(17, Size(64, 96))] * 3 if family == "5b-i2v" else None
    train(settings(shards=make_cache(family, clips), steps=3, memory=memory, **extra))
    assert found[2] == found[3] == []


def numbered(count: int) -> Iterator[Batch]:
    for number in range(count):
        yield Batch(*(torch.full((1,), number) for _ in range(5)))
    raise CacheError("no more")


def test_one_batch_is_ahead_and_its_error_waits_for_its_turn() -> None:
    read: list[int] = []

    def source() -> Iterator[Batch]:
        for batch in numbered(2):
            read.append(int(batch.timesteps_b))
            yield batch

    uploads = Uploads(source(), CPU)
    uploads.ahead()
    uploads.ahead()
    assert read == [0]
    assert int(uploads.take().timesteps_b) == 0
    uploads.ahead()
    assert read == [0, 1]
    assert int(uploads.take().timesteps_b) == 1
    uploads.ahead()
    with pytest.raises(CacheError, match="no more"):
        uploads.take()
    assert uploads.waited() > 0
    assert uploads.waited() == 0


def test_times_of_a_step_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 5.0, 6.0, 8.0, 8.5, 20.0, 21.0])
    monkeypatch.setattr("cogcache.train.clock.perf_counter", lambda: next(now))
    clock = StepClock(CPU)
    clock.lap("data", at_most=0.25)
    clock.lap("forward")
    clock.lap("data", at_most=3.0)
    clock.lap("forward")
    clock.lap("optimizer")
    first = clock.finish()()
    assert first.phases == {"data": 1.25, "forward": 6.0, "backward": 0.0, "optimizer": 0.5, "other": 0.75}
    assert first.total == 8.5
    clock.restart()
    clock.lap("backward")
    second = clock.finish()()
    assert second.phases["backward"] == second.total == 1.0
    second.add(first)
    assert second.total == 9.5
    assert sum(second.shares().values()) == pytest.approx(1)
