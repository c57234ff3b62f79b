"""AdamW over the trained parameters, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cogcache.config import TrainConfig
from cogcache.errors import CheckpointError
from cogcache.train.memory.optimizer import HostAdamW

__all__ = [
    "Update",
    "check_optimizer_state",
    "load_optimizer_state",
    "make_optimizer",
    "optimizer_state",
    "update_unless",
]


_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Update:
    """What one update gave: scalars on the device, so that nobody need wait for them.

    Attributes:
        norm: Gradient norm before clipping; infinity where float16 overflowed: the update was left out and the loss
            scale shrinks.
        halted: Whether a loss or a gradient was no number, in this step or before. From then on nothing is updated.
    """

    norm: Tensor
    halted: Tensor


def make_optimizer(
    config: TrainConfig,
    parameters: Mapping[str, nn.Parameter],
    *,
    on_host: bool = False,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """AdamW as configured; the learning rate is set anew before every step.

    Args:
        on_host: Keep its state in host memory.
        fused: Take torch's fused kernel, which can leave an update out by a flag on the device
            (:func:`update_unless`), and counts steps there. Default: on GPUs.
    """
    kind = HostAdamW if on_host else torch.optim.AdamW
    if fused is None:
        fused = all(parameter.is_cuda for parameter in parameters.values())
    return kind(
        parameters.values(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )


def update_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Update, unless ``skip``, a bool beside the parameters, is true: then weights and state stay as they are.

    Of a fused optimizer nobody but its kernel reads the flag: it is the one that torch's loss scaling sets.
    """
    if optimizer.defaults["fused"]:
        flagged: Any = optimizer  # torch declares the attribute nowhere
        flagged.found_inf = skip.float()
        optimizer.step()
    elif not skip:
        optimizer.step()


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Every state tensor as ``<parameter>.<name>`` (``exp_avg``, ``exp_avg_sq``, ``step``), where it is, not copied."""
    if isinstance(optimizer, HostAdamW):
        optimizer.settle()
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def check_optimizer_state(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Refuse optimizer state that is not of exactly these parameters; none at all is that of a fresh start.

    Raises:
        CheckpointError: naming what does not fit.
    """
    wanted = {
        f"{name}.{key}": torch.empty((), device="meta") if key == "step" else parameter
        for name, parameter in parameters.items()
        for key in _STATE
    }
    for full_name, value in state.items():
        if not _fits(value, wanted.get(full_name)) or (full_name.endswith(".step") and not value >= 0):
            raise CheckpointError(f"the optimizer state in the checkpoint does not fit: {full_name}.")
    missing = wanted.keys() - state.keys()
    if state and missing:
        raise CheckpointError(f"the checkpoint has no optimizer state for {min(missing)}.")


def _fits(value: Tensor, wanted: Tensor | None) -> bool:
    return wanted is not None and value.shape == wanted.shape and value.dtype in (wanted.dtype, torch.float32)


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_state` gave.

    Raises:
        CheckpointError: if it is of other parameters.
    """
    check_optimizer_state(parameters, state)
    for full_name, value in state.items():
        name, key = full_name.rsplit(".", 1)
        parameter = parameters[name]
        if isinstance(optimizer, HostAdamW):
            optimizer.state_of(parameter)[key].copy_(value)
            continue
        # AdamW counts steps on the CPU, if it is not fused; the moments live beside their parameter.
        on_cpu = key == "step" and not optimizer.defaults["fused"]
        optimizer.state[parameter][key] = value.clone() if on_cpu else value.to(parameter.device, copy=True)
