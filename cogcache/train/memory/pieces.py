"""A ``CogVideoXBlock`` cut at its attention: what comes before and what comes after, as pure functions.

Together with attention between them they compute what ``CogVideoXBlock.forward`` with ``CogVideoXAttnProcessor2_0`` of
diffusers computes, operation by operation; a test holds them against it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Pieces", "Rotary", "allow_recompilations", "can_skip_last", "pieces", "rotation"]

Rotary: TypeAlias = tuple[Tensor, Tensor] | None
_RECOMPILE_LIMIT = 64


class Pieces(NamedTuple):
    """The functions of this module by name, compiled or not."""

    before: Callable[..., Any]
    after: Callable[..., Any]
    middle: Callable[..., Any]
    skip_last: Callable[..., Any]
    between: Callable[..., Any]
    widen: Callable[..., Any]
    feed_forward: Callable[..., Any]
    gated: Callable[..., Any]
    join: Callable[..., Any]
    normed: Callable[..., Any]
    query: Callable[..., Any]
    key: Callable[..., Any]
    value: Callable[..., Any]


def pieces(*, compiled: bool) -> Pieces:
    """The parts of a block. Compiled once for all blocks of one shape, with and without a gradient."""
    plain = Pieces(
        *(before, after, middle, skip_last),
        *(between, widen, feed_forward, gated, join),
        *(normed, query, key, value),
    )
    if not compiled:
        return plain
    allow_recompilations()
    return Pieces(*(torch.compile(piece, dynamic=False) for piece in plain))


def allow_recompilations() -> None:
    """Each bucket, with and without a gradient, is a compilation of its own."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)


def before(
    block: Any, hidden: Tensor, text: Tensor, temb: Tensor, rotary: Rotary
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, L + S, H, D] of a block.

    Args:
        hidden: Video tokens [B, S, dim].
        text: Text tokens [B, L, dim].
        temb: Embedding of timestep (and ofs) [B, time_embed_dim].
        rotary: What :func:`rotation` made of the cosine and sine tables, or None.
    """
    tokens = normed(block, hidden, text, temb)
    return query(block, tokens, rotary), key(block, tokens, rotary), value(block, tokens, rotary)


def normed(block: Any, hidden: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """What query, key and value are made of: all tokens [B, L + S, dim], normalized."""
    video, captions, _, _ = block.norm1(hidden, text, temb)
    return torch.cat([captions, video], dim=1)


def query(block: Any, tokens: Tensor, rotary: Rotary) -> Tensor:
    """The query [B, L + S, H, D] of what :func:`normed` gave."""
    return _placed(block.attn1, block.attn1.to_q, block.attn1.norm_q, tokens, rotary)


def key(block: Any, tokens: Tensor, rotary: Rotary) -> Tensor:
    """Its key."""
    return _placed(block.attn1, block.attn1.to_k, block.attn1.norm_k, tokens, rotary)


def value(block: Any, tokens: Tensor, _: Rotary) -> Tensor:
    """Its value."""
    return _heads(linear(block.attn1.to_v, tokens), block.attn1.heads)


def _placed(attention: Any, projection: Any, norm: Any, tokens: Tensor, rotary: Rotary) -> Tensor:
    heads = _heads(linear(projection, tokens), attention.heads)
    if norm is not None:
        heads = norm(heads)
    return heads if rotary is None else _rotate(heads, rotary)


def _heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.view(*tokens.shape[:2], heads, -1)


def rotation(rotary: Rotary, length: int) -> Rotary:
    """Tables for all tokens, from those [S, D] of the video: float32 [1, L + S, 1, D] each.

    diffusers turns the pairs (a, b) of a head's channels into (a cos - b sin, b cos + a sin). So every channel is its
    own value times the first table plus its partner's times the second, whose sign alternates. Text has 1 and 0 and
    stays what it is. In this form nothing is cut and joined, neither in the forward nor in the backward pass.

    Args:
        length: Text tokens L.
    """
    if rotary is None:
        return None
    cos, sin = (table.float() for table in rotary)
    sign = torch.ones_like(sin[:1])
    sign[:, ::2] = -1
    cos = torch.cat([cos.new_ones(length, cos.shape[1]), cos])
    sin = torch.cat([sin.new_zeros(length, sin.shape[1]), sin * sign])
    return cos[None, :, None], sin[None, :, None]


def _rotate(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    values = states.float()
    partners = values.view(*values.shape[:-1], -1, 2).flip(-1).view_as(values)
    rotated: Tensor = (values * cos + partners * sin).to(states.dtype)
    return rotated


def after(block: Any, hidden: Tensor, text: Tensor, temb: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Video and text tokens behind the block, from its input and the attention output [B, L + S, H, D]."""
    hidden, text, inner, gate, text_gate = middle(block, hidden, text, temb, attended)
    return join(hidden, text, linear(block.ff.net[2], inner), gate, text_gate)


def middle(
    block: Any, hidden: Tensor, text: Tensor, temb: Tensor, attended: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`after` up to the last projection: video and text tokens, the feed-forward's inner activation
    [B, L + S, 4 dim], and the gates of its output.
    """
    hidden, text, tokens, gate, text_gate = between(block, hidden, text, temb, attended)
    return hidden, text, widen(block, tokens), gate, text_gate


def between(
    block: Any, hidden: Tensor, text: Tensor, temb: Tensor, attended: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`after` up to the feed-forward: video and text tokens, the feed-forward's input [B, L + S, dim], and the
    gates [B, 1, dim] of its output for video and text.
    """
    length = text.shape[1]
    chunks = block.norm1.linear(block.norm1.silu(temb)).chunk(6, dim=1)
    gate, text_gate = chunks[2][:, None, :], chunks[5][:, None, :]
    projection, dropout = block.attn1.to_out
    tokens = dropout(linear(projection, attended.flatten(2)))
    hidden = hidden + gate * tokens[:, length:]
    text = text + text_gate * tokens[:, :length]

    video, captions, gate, text_gate = block.norm2(hidden, text, temb)
    return hidden, text, torch.cat([captions, video], dim=1), gate, text_gate


def widen(block: Any, tokens: Tensor) -> Tensor:
    """The feed-forward's inner activation [..., 4 dim] from its input [..., dim]."""
    activation, dropout = block.ff.net[:2]
    inner: Tensor = dropout(activation(tokens))
    return inner


def feed_forward(block: Any, tokens: Tensor) -> Tensor:
    """The feed-forward of tokens [..., dim], each by itself."""
    return linear(block.ff.net[2], widen(block, tokens))


def join(
    hidden: Tensor, text: Tensor, tokens: Tensor, gate: Tensor, text_gate: Tensor
) -> tuple[Tensor, Tensor]:
    """Video and text tokens with the feed-forward's output [B, L + S, dim] added to them."""
    length = text.shape[1]
    return hidden + gate * tokens[:, length:], text + text_gate * tokens[:, :length]


def can_skip_last(block: Any, temb: Tensor) -> bool:
    """Whether :func:`skip_last` holds for the block: nothing in its last projection or in its gates is trained."""
    parts = (block.ff.net[2], block.norm2.linear)
    return not temb.requires_grad and not any(p.requires_grad for part in parts for p in part.parameters())


def skip_last(block: Any, grad_hidden: Tensor, grad_text: Tensor, gate: Tensor, text_gate: Tensor) -> Tensor:
    """Gradient of the inner activation of :func:`middle` from those of the block's outputs.

    The last projection is linear, so its output, a tenth of the block's products, need not be computed again for it.
    """
    weight: Tensor = block.ff.net[2].weight
    return gated(grad_hidden, grad_text, gate, text_gate) @ weight


def gated(grad_hidden: Tensor, grad_text: Tensor, gate: Tensor, text_gate: Tensor) -> Tensor:
    """Gradient of the feed-forward's output [B, L + S, dim] from those of the block's outputs."""
    return torch.cat([text_gate * grad_text, gate * grad_hidden], dim=1)


def linear(layer: Any, tokens: Tensor) -> Tensor:
    """A linear layer with or without a plain LoRA, whose products are computed in the dtype of ``tokens``.

    PEFT computes them in the float32 of the LoRA's weights; for bfloat16 tokens that doubles memory traffic and costs
    5% of a step, to no avail: tokens and result are rounded to bfloat16 anyway. The weights stay float32, and so do
    their gradients when they are added up.
    """
    lora = _plain_lora(layer)
    if lora is None:
        plain: Tensor = layer(tokens)
        return plain
    down, up, scale = lora
    base: Tensor = layer.base_layer(tokens)
    low = F.linear(tokens, down.to(tokens.dtype))
    return base + F.linear(low, up.to(tokens.dtype)) * scale


def _plain_lora(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scale) of a layer's one LoRA; None where PEFT has more to do: dropout, DoRA, several, merged or off."""
    names = getattr(layer, "active_adapters", None)
    if names is None or layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    (name,) = names
    if (
        name not in layer.lora_A
        or name in layer.lora_variant
        or not isinstance(layer.lora_dropout[name], nn.Identity)
    ):
        return None
    down, up = layer.lora_A[name], layer.lora_B[name]
    return (down.weight, up.weight, layer.scaling[name]) if up.bias is None else None
