"""diffusers' own blocks, compiled: for what the memory tiers do not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cogcache.train.memory.pieces import allow_recompilations

__all__ = ["compile_blocks"]


def compile_blocks(transformer: Any) -> None:
    """Let the blocks of a ``CogVideoXTransformer3DModel`` run compiled in training, one compilation for all.

    Outside of training they run as they are: shapes vary there. Call it after a LoRA is added.
    """
    allow_recompilations()
    for block in transformer.transformer_blocks:
        block.forward = _forward(block, block.forward)


def _forward(block: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, dynamic=False)

    def forward(*inputs: Any, **named: Any) -> Any:
        run = compiled if block.training and torch.is_grad_enabled() else plain
        return run(*inputs, **named)

    return forward
