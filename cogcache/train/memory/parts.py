"""A block's work in parts, so that less is there at once: for the tier that needs the least memory.

Two moments of a block's backward pass need the most, each sixteen tensors of the tokens' size (measured:
``benchmarks/records/2026-11-30-one-gpu.md``), and both can be cut:

- The feed-forward's inner activation is four times as wide as the tokens, and several of that size are there. Each
  token goes through the feed-forward by itself: so one half of the tokens goes, then the other.
- Query, key and value are there with their gradients, and with all that their own backward pass needs. Here they are
  made without the latter for attention's backward pass, and let go of. Then one after the other is made again, for its
  own. That costs three of a block's products once more.

What is computed is that of :mod:`~cogcache.train.memory.pieces`; what query, key and value send back is added up in
another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cogcache.train.memory.gradients import GradientSum, leaves
from cogcache.train.memory.pieces import Pieces, Rotary, can_skip_last

__all__ = ["after_in_parts", "backward_after_in_parts", "backward_before_in_parts"]

Pair: TypeAlias = tuple[Tensor, Tensor]
_PARTS = 2


def after_in_parts(
    how: Pieces, block: Any, hidden: Tensor, text: Tensor, temb: Tensor, attended: Tensor
) -> Pair:
    """As :func:`~cogcache.train.memory.pieces.after`. No gradient is recorded."""
    with torch.no_grad():
        hidden, text, tokens, gate, text_gate = how.between(block, hidden, text, temb, attended)
        for part in _parts(tokens):
            part.copy_(how.feed_forward(block, part))
        pair: Pair = how.join(hidden, text, tokens, gate, text_gate)
    return pair


def backward_after_in_parts(
    how: Pieces,
    block: Any,
    sources: Sequence[Tensor],
    trained: Sequence[nn.Parameter],
    out: Tensor,
    grads: Pair,
    found: GradientSum,
) -> Tensor:
    """Go back from ``grads``, of the block's outputs, to attention's output.

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
    for number, (part, grad) in enumerate(zip(_parts(tokens.detach()), _parts(passed), strict=True)):
        with torch.enable_grad():
            part.requires_grad_()
            end = how.feed_forward(block, part) if last is None else how.widen(block, part)
        if given is not None:
            _parts(given)[number].copy_(end.detach())
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


def backward_before_in_parts(
    how: Pieces,
    block: Any,
    sources: Sequence[Tensor],
    trained: Sequence[nn.Parameter],
    rotary: Rotary,
    grads: list[Tensor],
    found: GradientSum,
) -> None:
    """Go back from ``grads``, of query, key and value, to what went into the block. Takes them out of the list."""
    with torch.enable_grad():
        inputs = leaves(sources, found.needs)
        tokens = how.normed(block, *inputs)
    wanted, onward = [*inputs, *trained], tokens.requires_grad  # not in the first block
    passed: Tensor | None = None
    for make in (how.value, how.key, how.query):
        with torch.enable_grad():
            taken = tokens.detach().requires_grad_(onward)
            made = make(block, taken, rotary)
        back = found.add(wanted, [made], [grads.pop()], taken if onward else None)
        if back is not None:
            passed = back if passed is None else passed.add_(back)
        del made, taken, back
    if passed is not None:
        found.add(wanted, [tokens], [passed])


def _of_gates(grads: Pair, given: Tensor) -> Pair:
    """Gradients of the gates for video and text, from those of the block's outputs and what the feed-forward gave."""
    length = grads[1].shape[1]
    return (
        (grads[0] * given[:, length:]).sum(1, keepdim=True),
        (grads[1] * given[:, :length]).sum(1, keepdim=True),
    )


def _parts(tokens: Tensor) -> tuple[Tensor, ...]:
    """Views [rows, dim] of tokens [B, L + S, dim], all of one length but for the last."""
    return tokens.view(-1, tokens.shape[-1]).chunk(_PARTS)
