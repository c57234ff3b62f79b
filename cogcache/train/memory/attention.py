"""Fused attention in two halves, so that its output can be kept and its backward pass run without the forward one.

``F.scaled_dot_product_attention`` keeps what its backward pass needs in the autograd graph; here that is in the
caller's hands. The kernels are those that it would choose from. Tensors go in and out as [B, S, H, D], as projections
leave and take them, so that nothing is copied into another order on the way; the kernels see views [B, H, S, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Attended", "attend", "attend_backward", "attention"]

_aten: Any = torch.ops.aten


@dataclass
class Attended:
    """The output [B, S, H, D] and what the backward kernel wants beside it; that takes and gives [B, H, S, D]."""

    out: Tensor
    logsumexp: Tensor
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Attended:
    """softmax(Q K^T / sqrt(D)) V, all [B, S, H, D]. No gradient is recorded."""
    with torch.no_grad():
        query, key, value = _swap(query), _swap(key), _swap(value)
        attended = _kernel(query, key, value)(query, key, value)
        attended.out = _swap(attended.out)
        return attended


def attend_backward(
    attended: Attended, grad: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output, all [B, S, H, D]."""
    with torch.no_grad():
        query, key, value = _swap(query), _swap(key), _swap(value)
        grads = attended.backward(_swap(grad), query, key, value, _swap(attended.out), attended.logsumexp)
        return _swap(grads[0]), _swap(grads[1]), _swap(grads[2])


def _swap(tensor: Tensor) -> Tensor:
    """A view with heads and tokens in the other's place."""
    return tensor.transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The output of the same kernels as a step of the autograd graph, which keeps everything."""
    function: Any = _Attention
    out: Tensor = function.apply(query, key, value)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = attend(query, key, value)
        ctx.save_for_backward(query, key, value, attended.out, attended.logsumexp)
        ctx.kernel = attended.backward
        return attended.out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, logsumexp = ctx.saved_tensors
        return attend_backward(Attended(out, logsumexp, ctx.kernel), grad, query, key, value)


def _kernel(query: Tensor, key: Tensor, value: Tensor) -> Callable[[Tensor, Tensor, Tensor], Attended]:
    """cuDNN where it can (1.4x as fast as the flash kernel on an H200), else flash, else mathematics."""
    if query.device.type == "cpu":
        return _cpu
    if query.device.type != "cuda":
        return _math
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    if torch.backends.cuda.can_use_cudnn_attention(params):
        return _cudnn
    return _flash if torch.backends.cuda.can_use_flash_attention(params) else _math


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Attended:
    out, logsumexp, *rest = _aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, False, False
    )
    cum_q, cum_k, max_q, max_k, seed, offset, _ = rest

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_cudnn_attention_backward(
            *(grad, query, key, value, out, logsumexp, seed, offset),
            *(None, cum_q, cum_k, max_q, max_k, 0.0, False),
        )
        return grads

    return Attended(out, logsumexp, backward)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Attended:
    out, logsumexp, *rest = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False)
    cum_q, cum_k, max_q, max_k, seed, offset, _ = rest

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_backward(
            *(grad, query, key, value, out, logsumexp),
            *(cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset),
        )
        return grads

    return Attended(out, logsumexp, backward)


def _cpu(query: Tensor, key: Tensor, value: Tensor) -> Attended:
    out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False)

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, logsumexp, 0.0, False
        )
        return grads

    return Attended(out, logsumexp, backward)


def _math(query: Tensor, key: Tensor, value: Tensor) -> Attended:
    """For devices without a fused kernel: the forward pass is done again in the backward pass."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _ = out, logsumexp
        with torch.enable_grad():
            query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
            again = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        grads = torch.autograd.grad(again, (query, key, value), grad)
        return grads[0], grads[1], grads[2]

    return Attended(out, out.new_empty(0), backward)
