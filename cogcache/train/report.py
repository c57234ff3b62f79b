"""Telling how a run goes: a progress display, and the numbers of each step to the trackers."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from typing_extensions import Self

from cogcache.config import TrainConfig
from cogcache.progress import Progress, say
from cogcache.train.clock import StepTimes
from cogcache.train.data import Samples, StepPlan
from cogcache.train.metrics import ValidationResult, open_trackers

__all__ = ["NoReport", "Report", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        losses: By sample index, over all processes.
        stop: A signal's number, 0 for none.
        halted: Whether a loss or the gradient was no number, so that nothing was updated.
        times: Where the time went, on the main process.
    """

    losses: dict[int, float]
    grad_norm: float
    lr: float
    stop: int
    halted: bool
    times: StepTimes

    @property
    def loss(self) -> float:
        """Mean over the samples of the step."""
        return math.fsum(self.losses.values()) / len(self.losses)


class NoReport:
    """What processes other than the main one tell: nothing. A context manager."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what is open."""

    def step(self, plan: StepPlan, result: StepResult) -> None:
        """Report a finished step."""

    def validation(self, step: int, result: ValidationResult) -> None:
        """Report a validation of the state after ``step``."""


class Report(NoReport):
    """What the main process tells. ``done`` steps are already behind."""

    def __init__(
        self, config: TrainConfig, output: Path, samples: Samples, device: torch.device, done: int
    ) -> None:
        self._config, self._samples, self._device = config, samples, device
        self._stack = ExitStack()
        self._notes: dict[str, Any] = {}
        with self._stack:
            self._trackers = open_trackers(config, output, done)
            for tracker in self._trackers:
                self._stack.enter_context(closing(tracker))
            self._progress = self._stack.enter_context(Progress("train", config.steps - done, "steps"))
            self._stack = self._stack.pop_all()
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def step(self, plan: StepPlan, result: StepResult) -> None:
        """Report a finished step."""
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        self._progress.advance(loss=f"{result.loss:.4f}", lr=f"{result.lr:.2e}", **self._notes)
        if plan.number % self._config.log_every == 0 or plan.number == self._config.steps:
            values = self._values(plan, result, seconds)
            for tracker in self._trackers:
                tracker.log(plan.number, values)

    def validation(self, step: int, result: ValidationResult) -> None:
        """Report a validation of the state after ``step``."""
        for tracker in self._trackers:
            tracker.validation(step, result)
        loss = result.numbers().get("loss")
        if loss is not None:
            self._notes = {"validation_loss": f"{loss:.4f}"}
        parts = [f"loss {loss:.4f} on {result.clips} clips"] if loss is not None else []
        if result.videos:
            parts.append(f"{len(result.videos)} videos in {result.videos[0].path.parent}")
        say(f"Validation after step {step}: {', '.join(parts) or 'the loss is not a number'}.")
        self._started = time.perf_counter()  # a step's time is the step's alone

    def _values(self, plan: StepPlan, result: StepResult, seconds: float) -> dict[str, Any]:
        records = [self._samples.records[index] for index in result.losses]
        values: dict[str, Any] = {
            "epoch": plan.epoch,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "seconds": seconds,
            "samples_per_s": len(records) / seconds,
        }
        if self._device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        values["samples"] = [
            {"id": record.id, "t": self._samples.timestep(plan.epoch, record), "loss": loss}
            for record, loss in zip(records, result.losses.values(), strict=True)
        ]
        return values
