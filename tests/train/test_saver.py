"""Checkpoints are written while training goes on, and hold what the weights were at their step.

Mutations tried, each caught: weights or optimizer state not copied; the next checkpoint not waiting for the one before;
the end of the run not waiting; the error of a write lost; a write begun before its step is known to be finite; a live
draft written while training goes on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogcache.config import TrainConfig
from cogcache.errors import NonFiniteError, StoppedError, StorageError
from cogcache.train import saver, train
from cogcache.train.loop import Trainer
from cogcache.train.report import Report
from cogcache.train.saver import HostCopies

Settings = Callable[..., TrainConfig]


def contents(output: Path) -> dict[str, bytes]:
    """Every file of every checkpoint."""
    files = (path for path in output.glob("checkpoint-*/**/*") if path.is_file())
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def reference(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Checkpoints of a run that waits for each."""
    with monkeypatch.context() as patch:
        start = saver.Saver.start
        patch.setattr(saver.Saver, "start", lambda self, draft: (start(self, draft), self.wait()))
        train(settings(output=tmp_path / "reference", steps=6, checkpoint_every=2, keep_checkpoints=0))
    return contents(tmp_path / "reference")


class Gate:
    """Holds writes back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.steps, self.running, self.most = threading.Event(), list[int](), 0, 0
        write = saver.save_checkpoint

        def held(output: Path, state: Any, *rest: Any) -> Path:
            self.running += 1
            self.most = max(self.most, self.running)
            assert self.open.wait(60)
            self.steps.append(state.step)
            folder = write(output, state, *rest)
            self.running -= 1
            return folder

        monkeypatch.setattr(saver, "save_checkpoint", held)


def on_report(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    report = Report.step

    def step(self: Report, plan: Any, result: Any) -> None:
        report(self, plan, result)
        if plan.number == number:
            act()

    monkeypatch.setattr(Report, "step", step)


def test_training_goes_on_and_the_checkpoint_is_that_of_its_step(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, reference: dict[str, bytes]
) -> None:
    gate = Gate(monkeypatch)
    on_report(monkeypatch, 3, gate.open.set)  # later than checkpoint 2 is begun, after step 4 is launched
    config = settings(steps=6, checkpoint_every=2, keep_checkpoints=0)
    train(config)
    assert gate.steps == [2, 4, 6]
    assert gate.most == 1
    assert contents(config.output) == reference


def test_one_waits_for_the_one_before(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train(settings(output=tmp_path / "whole", steps=5, checkpoint_every=1, keep_checkpoints=0))
    gate = Gate(monkeypatch)
    on_report(monkeypatch, 1, lambda: threading.Timer(0.3, gate.open.set).start())
    config = settings(steps=5, checkpoint_every=1, keep_checkpoints=0)
    train(config)
    assert (gate.steps, gate.most) == ([1, 2, 3, 4, 5], 1)
    assert contents(config.output) == contents(tmp_path / "whole")


def test_the_end_of_a_run_waits_for_the_last(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    write = saver.save_checkpoint

    def slow(*args: Any) -> Path:
        time.sleep(0.3)
        return write(*args)

    monkeypatch.setattr(saver, "save_checkpoint", slow)
    result = train(settings(steps=2, checkpoint_every=2))
    assert (result.output / "checkpoint-000002" / "trainer_state.json").is_file()


def test_an_error_ends_the_run_at_the_next_step(
    settings: Settings, metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def failing(*_: Any) -> Path:
        assert gate.wait(60)
        raise StorageError("the disk is full.")

    monkeypatch.setattr(saver, "save_checkpoint", failing)
    check = saver.Saver.check

    def checking(self: saver.Saver) -> None:
        if gate.is_set() and self._writing is not None:
            self._writing.exception()
        check(self)

    monkeypatch.setattr(saver.Saver, "check", checking)
    on_report(monkeypatch, 4, gate.set)
    config = settings(steps=9, checkpoint_every=3)
    with pytest.raises(StorageError, match="full"):
        train(config)
    assert len(metrics(config.output)) == 4


def test_another_error_comes_first(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate, forward = threading.Event(), Trainer._forward

    def failing(*_: Any) -> Path:
        assert gate.wait(60)
        raise StorageError("the disk is full.")

    def poisoned(self: Trainer, batch: Any, step: int, micro: int) -> torch.Tensor:
        return forward(self, batch, step, micro) * (float("nan") if step == 3 else 1.0)

    refuse = Trainer._refuse_non_finite

    def refusing(self: Trainer, plan: Any, result: Any) -> None:
        if plan.number == 3:
            gate.set()
        refuse(self, plan, result)

    monkeypatch.setattr(saver, "save_checkpoint", failing)
    monkeypatch.setattr(Trainer, "_forward", poisoned)
    monkeypatch.setattr(Trainer, "_refuse_non_finite", refusing)
    with pytest.raises(NonFiniteError, match="step 3"):
        train(settings(steps=9, checkpoint_every=2))
    assert "could not be saved, either: the disk is full." in capsys.readouterr().err


def test_no_checkpoint_of_a_step_that_is_not_finite(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, forward = Gate(monkeypatch), Trainer._forward
    gate.open.set()

    def poisoned(self: Trainer, batch: Any, step: int, micro: int) -> torch.Tensor:
        return forward(self, batch, step, micro) * (float("nan") if step == 4 else 1.0)

    monkeypatch.setattr(Trainer, "_forward", poisoned)
    with pytest.raises(NonFiniteError):
        train(settings(steps=9, checkpoint_every=2))
    assert gate.steps == [2]


def test_without_room_for_copies_training_waits(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, reference: dict[str, bytes]
) -> None:
    monkeypatch.setattr(saver, "COPIES_SHARE", 0.0)
    done: list[int] = []
    start = saver.Saver.start

    def starting(self: saver.Saver, draft: saver.Draft) -> None:
        start(self, draft)
        assert draft.live
        assert self._writing is None
        done.append(draft.state.step)

    monkeypatch.setattr(saver.Saver, "start", starting)
    config = settings(steps=6, checkpoint_every=2, keep_checkpoints=0)
    train(config)
    assert done == [2, 4, 6]
    assert contents(config.output) == reference


def test_a_stop_writes_its_checkpoint_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    on_report(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    config = settings(steps=9, checkpoint_every=2)
    with pytest.raises(StoppedError, match="after step 2"):
        train(config)
    assert gate.steps == [2]
    assert (config.output / "checkpoint-000002").is_dir()


def test_buffers_are_used_again() -> None:
    copies = HostCopies(torch.device("cpu"))
    tensors = {"a": torch.ones(3), "b": torch.tensor(2.0)}
    first = copies.take(tensors)
    assert torch.equal(first["a"], tensors["a"])
    tensors["a"] += 1
    assert first["a"].tolist() == [1, 1, 1]
    assert copies.take(tensors)["a"].data_ptr() == first["a"].data_ptr()
    assert first["a"].tolist() == [2, 2, 2]
