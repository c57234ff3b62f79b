"""The feed-forward of a block for some of its tokens at a time.

Its inner activation is four times as wide as the tokens, and the backward pass holds several of that size: most of what
a block needs while it is at work. Each token goes through the feed-forward by itself, so the tokens may go through it
in parts, and all that is wide exists for one part only. Forward and backward pass are otherwise those of
:mod:`~cogcache.train.memory.pieces`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cogcache.train.memory.gradients import GradientSum, leaves
from cogcache.train.memory.pieces import Pieces, can_skip_last

__all__ = ["after_in_chunks", "backward_in_chunks"]

Pair: TypeAlias = tuple[Tensor, Tensor]


def after_in_chunks(
    how: Pieces, count: int, block: Any, hidden: Tensor, text: Tensor, temb: Tensor, attended: Tensor
) -> Pair:
    """As :func:`~cogcache.train.memory.pieces.after`, with the feed-forward in ``count`` parts. No gradient is
    recorded."""
    with torch.no_grad():
        hidden, text, tokens, gate, text_gate = how.between(block, hidden, text, temb, attended)
        for part in _parts(count, tokens):
            part.copy_(how.feed_forward(block, part))
        pair: Pair = how.join(hidden, text, tokens, gate, text_gate)
    return pair


def backward_in_chunks(
    how: Pieces,
    count: int,
    block: Any,
    sources: Sequence[Tensor],
    trained: Sequence[nn.Parameter],
    out: Tensor,
    grads: Pair,
    found: GradientSum,
) -> Tensor:
    """Go back from ``grads``, of the block's outputs, to what comes before attention's end.

    Args:
        sources: Video tokens, text tokens and the timestep's embedding that went into the block.
        trained: Its trained parameters.
        out: Attention's output [B, L + S, H, D].
        found: Where the gradients of ``sources`` and ``trained`` are added up.

    Returns:
        The gradient of ``out``.
    """
    with torch.enable_grad():
        inputs = leaves(sources, found.needs)
        out = out.detach().requires_grad_()
        hidden, text, tokens, gate, text_gate = how.between(block, *inputs, out)
    wanted = [*inputs, *trained]
    # The gradient of what the feed-forward gives; part by part it makes room for that of what the feed-forward takes.
    passed = how.gated(*grads, gate.detach(), text_gate.detach())
    given = torch.empty_like(tokens) if gate.requires_grad else None
    last = block.ff.net[2].weight if can_skip_last(block, inputs[2]) else None
    for number, (part, grad) in enumerate(
        zip(_parts(count, tokens.detach()), _parts(count, passed), strict=True)
    ):
        with torch.enable_grad():
            part.requires_grad_()
            end = how.feed_forward(block, part) if last is None else how.widen(block, part)
        if given is not None:
            _parts(count, given)[number].copy_(end.detach())
        back = found.add(wanted, [end], [grad if last is None else grad @ last], part)
        assert back is not None
        grad.copy_(back)
        del end, back
    ends, ends_grads = [hidden, text, tokens], [*grads, passed]
    if given is not None:
        ends, ends_grads = [*ends, gate, text_gate], [*ends_grads, *_of_gates(grads, given)]
    grad_out = found.add(wanted, ends, ends_grads, out)
    assert grad_out is not None
    return grad_out


def _of_gates(grads: Pair, given: Tensor) -> Pair:
    """Gradients of the gates for video and text, from those of the block's outputs and what the feed-forward gave."""
    length = grads[1].shape[1]
    return (
        (grads[0] * given[:, length:]).sum(1, keepdim=True),
        (grads[1] * given[:, :length]).sum(1, keepdim=True),
    )


def _parts(count: int, tokens: Tensor) -> tuple[Tensor, ...]:
    """Views [rows, dim] of tokens [B, L + S, dim], all of one length but for the last."""
    return tokens.view(-1, tokens.shape[-1]).chunk(count)
