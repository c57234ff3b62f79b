"""Telling how a run goes: a progress display, and the numbers of each step to the trackers."""

from __future__ import annotations

import math
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from typing_extensions import Self

from cogcache.config import TrainConfig
from cogcache.errors import StoppedError
from cogcache.geometry import Bucket
from cogcache.progress import Progress, say
from cogcache.train.clock import StepTimes
from cogcache.train.data import Samples, StepPlan
from cogcache.train.metrics import ValidationResult, open_trackers
from cogcache.train.verdict import Tally

__all__ = ["NoReport", "Report", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        losses: By sample index, over all processes.
        stop: A signal's number, 0 for none.
        halted: Whether a loss or the gradient was no number, so that nothing was updated.
        times: Where this process's time went.
        flops: Operations that this process's device computed.
    """

    losses: dict[int, float]
    grad_norm: float
    lr: float
    stop: int
    halted: bool
    times: StepTimes
    flops: int

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
    """What the main process tells.

    Args:
        done: Optimizer steps that are already behind.
        compiles: Whether the first step compiles the blocks.
        ceiling: Operations a second that the device reaches in matrix products; None if that was not measured.
    """

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        samples: Samples,
        device: torch.device,
        done: int,
        *,
        compiles: bool = False,
        ceiling: float | None = None,
    ) -> None:
        self._config, self._samples, self._device = config, samples, device
        self._compiles, self._ceiling = compiles, ceiling
        self._tally, self._first_times = Tally(config, ceiling), dict[Bucket, StepTimes]()
        self._stack = ExitStack()
        self._notes: dict[str, Any] = {}
        with self._stack:
            self._trackers = open_trackers(config, output, done)
            for tracker in self._trackers:
                self._stack.enter_context(closing(tracker))
            self._progress = self._stack.enter_context(Progress("train", config.steps - done, "steps"))
            self._stack = self._stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if kind is None or issubclass(kind, StoppedError):
            for line in self._tally.verdict(self._peak()):
                say(line)

    def step(self, plan: StepPlan, result: StepResult) -> None:
        """Report a finished step."""
        warm = self._is_warm(plan, result.times)
        if warm:
            self._tally.add(result.times, result.flops)
            self._notes["waiting_for_data"] = f"{result.times.shares()['data']:.0%}"
            self._notes["TFLOP/s"] = f"{result.flops / result.times.total / 1e12:.3g}"
        self._progress.advance(loss=f"{result.loss:.4f}", lr=f"{result.lr:.2e}", **self._notes)
        if plan.number % self._config.log_every == 0 or plan.number == self._config.steps:
            values = self._values(plan, result)
            for tracker in self._trackers:
                tracker.log(plan.number, values)

    def _is_warm(self, plan: StepPlan, times: StepTimes) -> bool:
        """Whether a step is none of its bucket's first, which may compile. Tells once how long that took."""
        bucket = self._samples.records[plan.batch[0]].bucket
        first = self._first_times.setdefault(bucket, times)
        if first is times:
            return False
        compiling = first.total - times.total
        if self._compiles and compiling >= 1:
            say(f"Compiled in {compiling:.0f} s; kept for the next run.")
        self._compiles = False
        return True

    def validation(self, step: int, result: ValidationResult) -> None:
        """Report a validation of the state after ``step``."""
        for tracker in self._trackers:
            tracker.validation(step, result)
        loss = result.numbers().get("loss")
        if loss is not None:
            self._notes["validation_loss"] = f"{loss:.4f}"
        parts = [f"loss {loss:.4f} on {result.clips} clips"] if loss is not None else []
        if result.videos:
            parts.append(f"{len(result.videos)} videos in {result.videos[0].path.parent}")
        say(f"Validation after step {step}: {', '.join(parts) or 'the loss is not a number'}.")

    def _values(self, plan: StepPlan, result: StepResult) -> dict[str, Any]:
        records = [self._samples.records[index] for index in result.losses]
        seconds = result.times.total
        rate = result.flops / seconds
        values: dict[str, Any] = {
            "epoch": plan.epoch,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "seconds": seconds,
            **{f"{phase}_s": spent for phase, spent in result.times.phases.items()},
            "samples_per_s": len(records) / seconds,
            "tflop_per_s": rate / 1e12,
        }
        if self._ceiling is not None:
            values["ceiling_share"] = rate / self._ceiling
        peak = self._peak()
        if peak is not None:
            values["peak_memory_gib"] = peak / 2**30
        values["samples"] = [
            {"id": record.id, "t": self._samples.timestep(plan.epoch, record), "loss": loss}
            for record, loss in zip(records, result.losses.values(), strict=True)
        ]
        return values

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
