"""The training loop.

One optimizer step is the mean loss over a set of samples of one bucket. The set is dealt to processes and
microbatches; each microbatch adds its part of the sum, divided by the number of samples in the whole set,
so the gradient does not depend on how the set was dealt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cogcache.config import TrainConfig
from cogcache.draws import seed_for
from cogcache.errors import CogcacheError, NonFiniteError, StoppedError
from cogcache.geometry import Bucket
from cogcache.progress import say
from cogcache.train.checkpoints import Checkpoint, TrainerState
from cogcache.train.clock import StepClock, StepTimes
from cogcache.train.data import Batch, Micro, Samples, StepPlan, read_ahead, step_plans
from cogcache.train.engine import open_engine
from cogcache.train.flops import step_flops
from cogcache.train.late import LateNumbers, Uploads
from cogcache.train.memory.measures import Measures
from cogcache.train.model import trainable
from cogcache.train.report import NoReport, Report, StepResult
from cogcache.train.saver import Draft, Saver
from cogcache.train.schedule import learning_rate
from cogcache.train.signals import StopRequest
from cogcache.train.tuning import Tuning
from cogcache.train.validation import Validator

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Trainer"]


@dataclass(frozen=True)
class LaunchedStep:
    """An optimizer step that was given to the device. ``numbers`` are the losses of all processes in rows, each with
    the number of a signal behind it; then the gradient's norm, and whether a number was none so far."""

    plan: StepPlan
    lr: float
    numbers: LateNumbers
    times: Callable[[], StepTimes]
    flops: int

    def read(self) -> StepResult:
        """What it gave; waits for it."""
        *flat, norm, halted = self.numbers.read()
        width = len(flat) // len(self.plan.micros)
        rows = [flat[start : start + width] for start in range(0, len(flat), width)]
        pairs = (pair for p, row in enumerate(rows) for pair in zip(self.plan.real(p), row, strict=False))
        stop = int(max(row[-1] for row in rows))
        return StepResult(dict(sorted(pairs)), norm, self.lr, stop, bool(halted), self.times(), self.flops)


class Trainer:
    """Trains the parameters of ``transformer`` that require a gradient.

    Args:
        transformer: On the device of ``accelerator``, prepared by ``tuning``.
        scheduler: The checkpoint's scheduler.
        dtype: What the transformer computes in; float16 gets loss scaling.
        run: What decides the numbers of this run (kept in checkpoints).
        tuning: What is trained and how it is written.
        validator: Measures held-out clips and samples videos in between.
        measures: Memory measures that the blocks run under; None for diffusers' own blocks.
        compiled: Whether blocks are compiled in their first step.
        ceiling: Operations a second that the device reaches in matrix products; None if that was not measured.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        transformer: nn.Module,
        scheduler: Any,
        samples: Samples,
        *,
        dtype: torch.dtype,
        output: Path,
        run: dict[str, Any],
        tuning: Tuning,
        validator: Validator,
        measures: Measures | None = None,
        compiled: bool = False,
        ceiling: float | None = None,
    ) -> None:
        self.config, self.accelerator, self.samples = config, accelerator, samples
        self.transformer, self.scheduler, self.dtype = transformer, scheduler, dtype
        self.output, self.run_record, self.tuning, self.validator = output, run, tuning, validator
        self.device, self.process = accelerator.device, accelerator.process_index
        self.scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(self.device)
        self.engine = open_engine(config, accelerator, transformer, trainable(transformer), dtype, measures)
        self.measures, self.compiled, self.ceiling = measures, compiled, ceiling
        self._known_flops: dict[tuple[Bucket, int], int] = {}
        self.clock = StepClock(self.device)
        self.done = 0
        self._launched: LaunchedStep | None = None
        self._loss: float | None = None
        self._draft: Draft | None = None
        self.saver = Saver(
            output,
            config.keep_checkpoints,
            self.device,
            self._write_weights,
            writes=accelerator.is_main_process,
        )
        self._report = NoReport()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where ``checkpoint`` was made.

        Raises:
            CheckpointError: if its tensors do not fit.
        """
        self.tuning.restore(self.transformer, checkpoint.weights)
        self.engine.restore(checkpoint.optimizer, checkpoint.state.scaler)
        self.done = checkpoint.state.step

    def train(self) -> float | None:
        """Run the remaining optimizer steps; the loss of the last one, None if there was none to do.

        The numbers of a step are read while the next one runs, so the device never waits for the host.

        Raises:
            NonFiniteError: if a loss or the gradient is not a number; nothing is updated then.
            StoppedError: after Ctrl-C or SIGTERM, with a checkpoint saved.
        """
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            stack.enter_context(self.saver)
            self._report = stack.enter_context(self._open_report())
            uploads = Uploads(stack.enter_context(closing(self._batches())), self.device)
            if self.validator.missing(self.done):
                self._validate(stop)
            self.clock.restart()
            for plan in self._plans():
                self._go_on(plan, uploads, stop)
            self._finish_last()
        return self._loss

    def _go_on(self, plan: StepPlan, uploads: Uploads, stop: StopRequest) -> None:
        """Give the device one more step, then look after the one before."""
        self.saver.check()
        try:
            launched = self._launch(plan, uploads, stop)
        except CogcacheError:
            self._finish_last()
            raise
        asked = self._finish_last()
        self.done, self._launched = plan.number, launched
        if self._checkpoint_due():
            self._draft = self._take()
        waits = self.engine.waits or (self._draft is not None and self._draft.live)
        if waits or self.validator.due(self.done):
            asked = asked or self._finish_last()
        if self.accelerator.num_processes == 1:
            asked = stop.number  # else all must hear of it at the same step
        if asked:
            self._finish_last()
            self.save()
            raise self._stopped(asked)
        if self.validator.due(self.done):
            self._validate(stop)

    def _finish_last(self) -> int:
        """Read and report the step that was launched last; the number of a signal that a process had got by then."""
        step, self._launched = self._launched, None
        if step is None:
            return 0
        result = step.read()
        self._refuse_non_finite(step.plan, result)
        self._loss = result.loss
        self._report.step(step.plan, result)
        draft, self._draft = self._draft, None
        if draft is not None:  # of this very step, whose numbers are known to be numbers now
            self.saver.start(draft)
        return result.stop

    def _validate(self, stop: StopRequest) -> None:
        """Validate the state after the steps done. A checkpoint, if due, is saved already."""
        result = self.validator.run(self.done, stop)
        if result.stop:  # what was validated is not reported: the resumed run does it anew
            self.save()
            raise self._stopped(result.stop)
        self._report.validation(self.done, result)
        self.clock.restart()

    def _launch(self, plan: StepPlan, uploads: Uploads, stop: StopRequest) -> LaunchedStep:
        micros = plan.micros[self.process]
        losses = []
        for number, micro in enumerate(micros, 1):
            batch = uploads.take()
            self.clock.lap("data", at_most=uploads.waited())
            with self.engine.microbatch(last=number == len(micros)):
                loss_b = self._forward(batch, plan.number, number)
                self.clock.lap("forward")
                losses.append(loss_b.detach()[: micro.real])
                self._backward(loss_b, micro.real, len(plan.batch))
                self.clock.lap("backward")
        lr = learning_rate(self.config, plan.number - 1)
        rows = self._exchange(torch.cat(losses), stop)
        self.saver.protect()
        update = self.engine.step(lr, ~rows.isfinite().all())
        self.clock.lap("optimizer")  # before the numbers leave, so that it has passed when they are read
        numbers = LateNumbers(torch.cat([rows.flatten(), update.norm.view(1), update.halted.view(1)]))
        uploads.ahead()
        return LaunchedStep(plan, lr, numbers, self.clock.finish(), sum(map(self._flops, micros)))

    def _flops(self, micro: Micro) -> int:
        record, size = self.samples.records[micro.samples[0]], len(micro.samples)
        key = (record.bucket, size)
        if key not in self._known_flops:
            flops = step_flops(self.transformer, self.samples.variant, *key, self.measures)
            self._known_flops[key] = flops.total
        return self._known_flops[key]

    def _forward(self, batch: Batch, step: int, micro: int) -> Tensor:
        """Loss of each sample of a microbatch, fillers included, float32 [B]."""
        if self.config.lora_dropout:
            torch.manual_seed(seed_for(self.config.seed, "lora dropout", step, micro, self.process))
        return batch.losses(self.engine.model, self.scheduler, self.samples.variant, self.dtype)

    def _backward(self, loss_b: Tensor, real: int, total: int) -> None:
        """Add this microbatch's part of the mean over ``total`` samples. Fillers count as zero."""
        weights_b = (torch.arange(len(loss_b), device=self.device) < real).float()
        # Data parallelism averages gradients over processes; the factor turns that into their sum.
        loss = (loss_b * weights_b).sum() * (self.accelerator.num_processes / total)
        self.engine.backward(loss)

    def _exchange(self, losses: Tensor, stop: StopRequest) -> Tensor:
        """All losses of the step and whether a process was asked to stop, in every process: a row for each, with the
        number of its signal last. Nobody reads them here."""
        row = torch.zeros(self.config.batch_size * self.config.grad_accum + 1, device=self.device)
        row[: len(losses)] = losses
        row[-1].fill_(stop.number)  # assigned, the number would be copied from the host
        rows: Tensor = self.accelerator.gather(row)
        return rows.view(-1, len(row))

    def _refuse_non_finite(self, plan: StepPlan, result: StepResult) -> None:
        bad = [
            self.samples.records[index] for index, loss in result.losses.items() if not math.isfinite(loss)
        ]
        if bad:
            names = ", ".join(f"{record.id} ({record.source})" for record in bad)
            raise NonFiniteError(
                f"the loss of step {plan.number} is not a number, for sample {names}.",
                "Nothing was updated. Resume from the last checkpoint with a lower --lr, "
                "or look at that clip.",
            )
        if result.halted:
            raise NonFiniteError(
                f"the gradient of step {plan.number} is not a number.",
                "Nothing was updated. Resume from the last checkpoint with a lower --lr.",
            )

    def save(self) -> None:
        """Save a checkpoint of the steps done, unless that is done or being done; returns when it is on disk."""
        if self.saver.step != self.done:
            self.saver.start(self._take())
        self.saver.wait()
        self.accelerator.wait_for_everyone()

    def _take(self) -> Draft:
        """What a checkpoint of the steps launched holds."""
        tensors = self.engine.state()  # by all processes, which may hold a part each
        weights = self.tuning.state(self.transformer) if self.accelerator.is_main_process else {}
        state = TrainerState(self.done, self.run_record, self.engine.scaler_state())
        return self.saver.take(state, weights, tensors)

    def _write_weights(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        self.tuning.write_checkpoint(folder, self.transformer, weights)

    def _checkpoint_due(self) -> bool:
        every = self.config.checkpoint_every
        return bool(every) and (self.done % every == 0 or self.done == self.config.steps)

    def _plans(self) -> Iterator[StepPlan]:
        return step_plans(self.samples.records, self.config, self.accelerator.num_processes, self.done)

    def _batches(self) -> Any:
        micros = (micro for plan in self._plans() for micro in plan.micros[self.process])
        pin = self.device.type == "cuda"
        return read_ahead(lambda micro: self.samples.batch(micro, pin=pin), micros, self.config.workers)

    def _open_report(self) -> NoReport:
        if not self.accelerator.is_main_process:
            return NoReport()
        return Report(
            self.config,
            self.output,
            self.samples,
            self.device,
            self.done,
            compiles=self.compiled,
            ceiling=self.ceiling,
        )

    def _stopped(self, number: int) -> StoppedError:
        say(f"Stopped after step {self.done} of {self.config.steps}; checkpoint saved.")
        return StoppedError(
            f"stopped by a signal after step {self.done} of {self.config.steps}; a checkpoint is saved.",
            number,
            "Run the same command with --resume latest to go on.",
        )
