"""Who computes gradients over processes and updates the parameters: an engine.

:class:`PlainEngine` is one process, or several with a whole copy of everything each (data parallelism).
:mod:`cogcache.train.zero` splits gradients and optimizer state over the processes by DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from cogcache.config import TrainConfig
from cogcache.errors import CheckpointError
from cogcache.train.memory.measures import Measures
from cogcache.train.optimizer import (
    Update,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    update_unless,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Engine", "PlainEngine", "open_engine"]


class Engine(Protocol):
    """Gradients, updates and optimizer state of the parameters that require a gradient.

    Attributes:
        model: The transformer as it must be called in training.
        waits: Whether :meth:`step` waits for the device anyway, so that nothing is won by reading its result late.
    """

    model: nn.Module
    waits: bool

    def microbatch(self, last: bool) -> AbstractContextManager[object]:
        """Around the forward and the backward pass of a microbatch; ``last`` is that before the update."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, a scalar. Gradients are averaged over processes."""
        ...

    def step(self, lr: float, refused: Tensor) -> Update:
        """Clip once, update, clear the gradients.

        Args:
            refused: A bool on the device: a loss of this step is no number, so nothing may be updated any more.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Optimizer state as :func:`cogcache.train.optimizer.optimizer_state` names it, whole.

        The next step changes it.

        All processes must call it; only the main process gets the tensors.
        """
        ...

    def scaler_state(self) -> Mapping[str, Any]:
        """State of the loss scaling; empty without."""
        ...

    def restore(self, state: Mapping[str, Tensor], scaler: Mapping[str, Any]) -> None:
        """Put back what :meth:`state` and :meth:`scaler_state` gave, after the weights were put back.

        Raises:
            CheckpointError: if it is of other parameters.
        """
        ...


class PlainEngine:
    """Every process holds all gradients and all optimizer state; float16 gets loss scaling."""

    waits = False

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        transformer: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
        measures: Measures | None = None,
    ) -> None:
        self.config, self.accelerator, self.parameters = config, accelerator, parameters
        self.model: nn.Module = accelerator.prepare_model(transformer, device_placement=False)
        on_host = measures is not None and measures.optimizer == "host"
        self.optimizer = make_optimizer(config, parameters, on_host=on_host)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=dtype == torch.float16)
        self._halted = torch.zeros((), dtype=torch.bool, device=accelerator.device)

    def microbatch(self, last: bool) -> AbstractContextManager[object]:
        """See :class:`Engine`."""
        if last:
            return nullcontext()
        alone: AbstractContextManager[object] = self.accelerator.no_sync(self.model)
        return alone

    def backward(self, loss: Tensor) -> None:
        """See :class:`Engine`."""
        scaled: Any = self.scaler.scale(loss)
        scaled.backward()

    def step(self, lr: float, refused: Tensor) -> Update:
        """See :class:`Engine`. The host waits for nothing."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        limit = self.config.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        overflown = ~norm.isfinite()
        self._halted = self._halted | refused | (overflown & ~self._can_scale_down(norm))
        update_unless(self.optimizer, self._halted | overflown)
        self.scaler.update()  # the scale shrinks if float16 overflowed
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, self._halted)

    def _can_scale_down(self, like: Tensor) -> Tensor:
        """Whether an overflow may be due to the loss scale: a bool on the device."""
        if not self.scaler.is_enabled():
            return torch.zeros_like(like, dtype=torch.bool)
        scale: Tensor = self.scaler.scale(torch.ones_like(like))
        return scale >= 1.0

    def state(self) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        if not self.accelerator.is_main_process:
            return {}
        return optimizer_state(self.optimizer, self.parameters)

    def scaler_state(self) -> Mapping[str, Any]:
        """See :class:`Engine`."""
        return self.scaler.state_dict()

    def restore(self, state: Mapping[str, Tensor], scaler: Mapping[str, Any]) -> None:
        """See :class:`Engine`."""
        load_optimizer_state(self.optimizer, self.parameters, state)
        try:
            self.scaler.load_state_dict(dict(scaler))
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(f"the loss scaling in the checkpoint does not fit: {error}.") from None


def open_engine(
    config: TrainConfig,
    accelerator: Accelerator,
    transformer: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    dtype: torch.dtype,
    measures: Measures | None = None,
) -> Engine:
    """The engine that the launch asks for. ``transformer`` is where it belongs.

    Args:
        measures: Memory measures in force; None for diffusers' own blocks.
    """
    from accelerate import DistributedType

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from cogcache.train.zero import ZeroEngine

        return ZeroEngine(config, accelerator, transformer, parameters, dtype)
    return PlainEngine(config, accelerator, transformer, parameters, dtype, measures)
