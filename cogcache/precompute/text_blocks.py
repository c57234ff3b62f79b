"""The blocks of a T5 encoder with their weights in host memory, for GPUs that do not hold them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cogcache.streamed import CopyStreams, StreamedWeights, move_without

__all__ = ["stream_blocks"]


def stream_blocks(model: Any, device: torch.device) -> None:
    """Make a frozen ``T5EncoderModel`` run on ``device``, two blocks' weights there at a time.

    While a block works, the next one's weights arrive; the last is followed by the first, for the next batch. The
    token embedding, the last norm and the table of relative positions (the first block's alone) stay on the device.
    """
    blocks = list(model.encoder.block)
    parameters = [_like_all(block) for block in blocks]
    move_without(model, [p for own in parameters for p in own], device)
    weights = StreamedWeights(parameters, CopyStreams(device))
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(_enter(weights, index, (index + 1) % len(blocks)))
        block.register_forward_hook(_leave(weights, index))


def _like_all(block: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in block.named_parameters() if "relative_attention_bias" not in name]


def _enter(weights: StreamedWeights, index: int, following: int) -> Callable[..., None]:
    def hook(*_: object) -> None:
        weights.enter(index, following)

    return hook


def _leave(weights: StreamedWeights, index: int) -> Callable[..., None]:
    def hook(*_: object) -> None:
        weights.leave(index)

    return hook
