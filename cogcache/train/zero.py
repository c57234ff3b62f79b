"""DeepSpeed's ZeRO stages 1 and 2: gradients and optimizer state split over the processes.

DeepSpeed is reached through Accelerate (``accelerate launch --use_deepspeed --zero_stage 2``). The optimizer, its
settings, precision and clipping stay those of the command line, and checkpoints are the same files as without
DeepSpeed: the whole state is gathered by DeepSpeed's own functions, so a run may go on with or without it, on
another number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cogcache.config import TrainConfig
from cogcache.errors import CheckpointError, ConfigError
from cogcache.train.optimizer import Update, check_optimizer_state, make_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["ZeroEngine", "check_deepspeed"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_deepspeed(settings: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed configuration that this project does not support, or that decides what flags decide.

    Raises:
        ConfigError: naming the part and what to do.
    """
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        raise ConfigError(
            f"DeepSpeed ZeRO stage {zero.get('stage')} is not supported: training keeps the transformer whole "
            "in every process, and saves it from there.",
            "Launch with --zero_stage 2 (or 1), or without DeepSpeed.",
        )
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device", "none") not in ("none", None):
            raise ConfigError(f"DeepSpeed's {part} is not supported.", "Leave it out.")
    for part in ("fp16", "bf16", "amp", "torch_autocast"):
        if (settings.get(part) or {}).get("enabled") is True:
            raise ConfigError(f"precision is chosen by --dtype, not by DeepSpeed's {part}.", "Leave it out.")
    for part in ("optimizer", "scheduler"):
        if part in settings:
            raise ConfigError(
                f"the {part} is chosen by cogcache's flags, not by the DeepSpeed configuration.",
                "Leave it out.",
            )


class ZeroEngine:
    """An :class:`~cogcache.train.engine.Engine`: every process updates its share of the parameters."""

    waits = True

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        transformer: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
    ) -> None:
        """Raises ConfigError for float16, whose loss scaling is not at hand here."""
        if dtype == torch.float16:
            raise ConfigError(
                "training in float16 is not supported under DeepSpeed.",
                "Use --dtype bfloat16 or float32, or launch without DeepSpeed.",
            )
        self.parameters, self._main = parameters, accelerator.is_main_process
        settings = accelerator.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.batch_size
        settings["gradient_accumulation_steps"] = 1  # this loop says itself where a step ends
        settings["train_batch_size"] = config.batch_size * accelerator.num_processes
        settings["gradient_clipping"] = config.max_grad_norm
        self.model: Any
        self.model, _ = accelerator.prepare(transformer, make_optimizer(config, parameters, fused=False))

    def microbatch(self, last: bool) -> AbstractContextManager[object]:
        """See :class:`~cogcache.train.engine.Engine`."""
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See :class:`~cogcache.train.engine.Engine`."""
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, refused: Tensor) -> Update:
        """See :class:`~cogcache.train.engine.Engine`. DeepSpeed waits for the norm, and so may we."""
        if refused:
            return Update(torch.full_like(refused, math.nan, dtype=torch.float32), refused)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self.model.step()  # clips, and leaves the update out where the norm is not finite
        norm = torch.as_tensor(self.model.get_global_grad_norm(), dtype=torch.float32, device=refused.device)
        return Update(norm, ~norm.isfinite())

    def state(self) -> dict[str, Tensor]:
        """See :class:`~cogcache.train.engine.Engine`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self._states()[0]["step"]
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            whole = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            if self._main:
                state.update({f"{name}.{key}": tensor.cpu() for key, tensor in whole.items()})
                state[f"{name}.step"] = step.clone()
        return state

    def scaler_state(self) -> Mapping[str, Any]:
        """See :class:`~cogcache.train.engine.Engine`."""
        return {}

    def restore(self, state: Mapping[str, Tensor], scaler: Mapping[str, Any]) -> None:
        """See :class:`~cogcache.train.engine.Engine`."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if scaler:
            raise CheckpointError("the checkpoint is of a float16 run.", "Go on without DeepSpeed.")
        check_optimizer_state(self.parameters, state)
        self._make_states(next((value for key, value in state.items() if key.endswith(".step")), None))
        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, parameter.detach())  # DeepSpeed updates a copy of its own
            for key in _MOMENTS if state else ():
                value = state[f"{name}.{key}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, key)

    @property
    def _optimizer(self) -> Any:
        """The AdamW that works on this process's flat share of the parameters."""
        zero: Any = self.model.optimizer
        return zero.optimizer

    def _shares(self) -> list[Tensor]:
        zero: Any = self.model.optimizer
        return list(zero.single_partition_of_fp32_groups)

    def _states(self) -> list[dict[str, Tensor]]:
        return [self._optimizer.state[share] for share in self._shares()]

    def _make_states(self, step: Tensor | None) -> None:
        """Empty AdamW state for each share, which the first step would make, linked to the parameters."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if step is None:
            return
        zero: Any = self.model.optimizer
        for share, parameters in zip(self._shares(), zero.bit16_groups, strict=True):
            moments = {key: torch.zeros_like(share) for key in _MOMENTS}
            self._optimizer.state[share] = {"step": step.clone(), **moments}
            lazy_init_hp_params_optimizer_state(parameters, share, self._optimizer.state)
