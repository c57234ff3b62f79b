"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from cogcache.config import TrainConfig

__all__ = ["learning_rate"]

_POLYNOMIAL_END = 1e-7
"""Final rate of the polynomial schedule, as in diffusers' ``get_polynomial_decay_schedule_with_warmup``."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of optimizer step number ``step``, counted from 0.

    Rises linearly from 0 over ``warmup_steps``, then follows ``lr_scheduler`` to the end at ``steps``.
    Agrees with ``diffusers.optimization.get_scheduler`` at its defaults (one cycle, power 1).
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.lr_scheduler == "constant":
        return config.lr
    part = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.lr_scheduler == "linear":
        return config.lr * max(0.0, 1.0 - part)
    if config.lr_scheduler == "polynomial":
        end = min(_POLYNOMIAL_END, config.lr)
        return end + (config.lr - end) * max(0.0, 1.0 - part)
    if config.lr_scheduler == "cosine_with_restarts" and part >= 1.0:
        return 0.0
    return config.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * part)))
