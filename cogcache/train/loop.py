"""The training loop.

One optimizer step is the mean loss over a set of samples of one bucket. The set is dealt to processes and
microbatches; each microbatch adds its part of the sum, divided by the number of samples in the whole set,
so the gradient does not depend on how the set was dealt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cogcache.config import TrainConfig
from cogcache.draws import seed_for
from cogcache.errors import NonFiniteError, StoppedError
from cogcache.progress import say
from cogcache.train.checkpoints import Checkpoint, TrainerState, prune_checkpoints, save_checkpoint
from cogcache.train.data import Batch, Samples, StepPlan, read_ahead, step_plans
from cogcache.train.engine import open_engine
from cogcache.train.memory.measures import Measures
from cogcache.train.model import trainable
from cogcache.train.objective import loss_per_sample
from cogcache.train.report import NoReport, Report, StepResult
from cogcache.train.schedule import learning_rate
from cogcache.train.signals import StopRequest
from cogcache.train.tuning import Tuning
from cogcache.train.validation import Validator

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Trainer"]


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
    ) -> None:
        self.config, self.accelerator, self.samples = config, accelerator, samples
        self.transformer, self.scheduler, self.dtype = transformer, scheduler, dtype
        self.output, self.run_record, self.tuning, self.validator = output, run, tuning, validator
        self.device, self.process = accelerator.device, accelerator.process_index
        self.scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(self.device)
        self.engine = open_engine(config, accelerator, transformer, trainable(transformer), dtype, measures)
        self.done = 0

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

        Raises:
            NonFiniteError: if a loss or the gradient is not a number; nothing is updated then.
            StoppedError: after Ctrl-C or SIGTERM, with a checkpoint saved.
        """
        loss = None
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            report = stack.enter_context(self._open_report())
            batches = stack.enter_context(closing(self._batches()))
            if self.validator.missing(self.done):
                self._validate(report, stop)
            for plan in self._plans():
                result = self._step(plan, batches, stop)
                self.done, loss = plan.number, result.loss
                report.step(plan, result)
                if result.stop or self._checkpoint_due():
                    self.save()
                if result.stop:
                    raise self._stopped(result.stop)
                if self.validator.due(self.done):
                    self._validate(report, stop)
        return loss

    def _validate(self, report: NoReport, stop: StopRequest) -> None:
        """Validate the state after the steps done. A checkpoint, if due, is saved already."""
        result = self.validator.run(self.done, stop)
        if result.stop:  # what was validated is not reported: the resumed run does it anew
            self.save()
            raise self._stopped(result.stop)
        report.validation(self.done, result)

    def _step(self, plan: StepPlan, batches: Iterator[Batch], stop: StopRequest) -> StepResult:
        micros = plan.micros[self.process]
        losses = []
        for number, micro in enumerate(micros, 1):
            with self.engine.microbatch(last=number == len(micros)):
                loss_b = self._forward(next(batches), plan.number, number)
                losses.append(loss_b.detach()[: micro.real])
                self._backward(loss_b, micro.real, len(plan.batch))
        per_sample, stop_number = self._exchange(plan, torch.cat(losses), stop)
        self._refuse_non_finite(plan, per_sample)
        lr = learning_rate(self.config, plan.number - 1)
        return StepResult(per_sample, self._update(plan, lr), lr, stop_number)

    def _forward(self, batch: Batch, step: int, micro: int) -> Tensor:
        """Loss of each sample of a microbatch, fillers included, float32 [B]."""
        if self.config.lora_dropout:
            torch.manual_seed(seed_for(self.config.seed, "lora dropout", step, micro, self.process))
        batch = batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
        return loss_per_sample(
            self.engine.model,
            self.scheduler,
            batch.moments_bcfhw,
            batch.prompt_embeds_bld,
            noise_bpchw=batch.noise_bpchw,
            timesteps_b=batch.timesteps_b,
            variant=self.samples.variant,
            posterior_noise_bcfhw=batch.posterior_noise_bcfhw,
            image_latents_bcfhw=batch.image_latents_bcfhw,
            dtype=self.dtype,
        )

    def _backward(self, loss_b: Tensor, real: int, total: int) -> None:
        """Add this microbatch's part of the mean over ``total`` samples. Fillers count as zero."""
        weights_b = (torch.arange(len(loss_b), device=self.device) < real).float()
        # Data parallelism averages gradients over processes; the factor turns that into their sum.
        loss = (loss_b * weights_b).sum() * (self.accelerator.num_processes / total)
        self.engine.backward(loss)

    def _exchange(self, plan: StepPlan, losses: Tensor, stop: StopRequest) -> tuple[dict[int, float], int]:
        """Every process learns all losses of the step, and whether any process was asked to stop."""
        row = torch.zeros(self.config.batch_size * self.config.grad_accum + 1, device=self.device)
        row[: len(losses)] = losses
        row[-1] = stop.number
        rows = self.accelerator.gather(row).view(-1, len(row)).tolist()
        pairs = (pair for p, values in enumerate(rows) for pair in zip(plan.real(p), values, strict=False))
        return dict(sorted(pairs)), int(max(values[-1] for values in rows))

    def _refuse_non_finite(self, plan: StepPlan, losses: dict[int, float]) -> None:
        bad = [self.samples.records[index] for index, loss in losses.items() if not math.isfinite(loss)]
        if bad:
            names = ", ".join(f"{record.id} ({record.source})" for record in bad)
            raise NonFiniteError(
                f"the loss of step {plan.number} is not a number, for sample {names}.",
                "Nothing was updated. Resume from the last checkpoint with a lower --lr, "
                "or look at that clip.",
            )

    def _update(self, plan: StepPlan, lr: float) -> float:
        """Update the parameters; returns the gradient norm before clipping."""
        try:
            return self.engine.step(lr)
        except FloatingPointError:
            raise NonFiniteError(
                f"the gradient of step {plan.number} is not a number.",
                "Nothing was updated. Resume from the last checkpoint with a lower --lr.",
            ) from None

    def save(self) -> None:
        """Save a checkpoint of the steps done, then delete the oldest beyond the limit."""
        tensors = self.engine.state()  # by all processes, which may hold a part each
        if self.accelerator.is_main_process:
            state = TrainerState(self.done, self.run_record, self.engine.scaler_state())
            save_checkpoint(self.output, state, self._write_weights, tensors)
            prune_checkpoints(self.output, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _write_weights(self, folder: Path) -> None:
        self.tuning.write_checkpoint(folder, self.transformer)

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
        return Report(self.config, self.output, self.samples, self.device, self.done)

    def _stopped(self, number: int) -> StoppedError:
        say(f"Stopped after step {self.done} of {self.config.steps}; checkpoint saved.")
        return StoppedError(
            f"stopped by a signal after step {self.done} of {self.config.steps}; a checkpoint is saved.",
            number,
            "Run the same command with --resume latest to go on.",
        )
