"""What lies between the convolutions of the VAE's encoder, in as few passes over memory as it can be done in.

Tensors are contiguous ``[B, T, H, W, C]`` (shape suffix ``bthwc``), so a convolution takes them as channels-last
without a copy. On CUDA these are Triton kernels (:mod:`cogcache.precompute.fused_kernels`); elsewhere plain
torch, which is what the kernels are tested against.

A convolution is called without its bias, which costs a pass of its own; each function here takes that ``bias``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Affine", "add", "add_and_pool", "has_kernels", "norm_silu", "norm_statistics"]


class Affine(NamedTuple):
    """A group norm with its statistics put in: ``x * scale_bc + shift_bc``, float32 ``[B, C]`` each."""

    scale_bc: Tensor
    shift_bc: Tensor


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels run on ``device``."""
    return device.type == "cuda" and find_spec("triton") is not None


def add(
    x_bthwc: Tensor, bias_c: Tensor, residual_bthwc: Tensor | None, norm: torch.nn.GroupNorm
) -> tuple[Tensor, Affine]:
    """``x + bias + residual`` and the group norm of it."""
    if has_kernels(x_bthwc.device):
        from cogcache.precompute.fused_kernels import statistics

        total, scale_bc, shift_bc = statistics(x_bthwc, bias_c, residual_bthwc, norm, keep=True)
        return total, Affine(scale_bc, shift_bc)
    total = _add(x_bthwc, bias_c, residual_bthwc).to(x_bthwc.dtype)
    return total, _statistics(total.float(), norm)


def norm_statistics(x_bthwc: Tensor, bias_c: Tensor, norm: torch.nn.GroupNorm) -> Affine:
    """The group norm of ``x + bias``, to be applied by :func:`norm_silu` to ``x`` with the same bias."""
    if has_kernels(x_bthwc.device):
        from cogcache.precompute.fused_kernels import statistics

        return Affine(*statistics(x_bthwc, bias_c, None, norm, keep=False)[1:])
    return _statistics(_add(x_bthwc, bias_c, None), norm)


def norm_silu(x_bthwc: Tensor, bias_c: Tensor | None, affine: Affine, cached_bthwc: Tensor | None) -> Tensor:
    """``silu(norm(x + bias))`` behind the two frames before it, ``[B, T + 2, H, W, C]``: a causal convolution's input.

    Args:
        cached_bthwc: Those two frames; None: the first frame stands for them.
    """
    b, _, h, w, c = x_bthwc.shape
    if has_kernels(x_bthwc.device):
        from cogcache.precompute.fused_kernels import apply

        return apply(x_bthwc, bias_c, *affine, cached_bthwc)
    value = x_bthwc.float() if bias_c is None else _add(x_bthwc, bias_c, None)
    normal = value * affine.scale_bc.view(b, 1, 1, 1, c) + affine.shift_bc.view(b, 1, 1, 1, c)
    result = functional.silu(normal).to(x_bthwc.dtype)
    before = result[:, :1].expand(b, 2, h, w, c) if cached_bthwc is None else cached_bthwc
    return torch.cat([before, result], dim=1)


def add_and_pool(x_bthwc: Tensor, bias_c: Tensor, residual_bthwc: Tensor, *, in_time: bool) -> Tensor:
    """``x + bias + residual``, in time the means of pairs, with a row and a column of zeros behind it.

    An odd number of frames keeps its first as it is.

    Returns:
        ``[B, T', H + 1, W + 1, C]``; T' is half of T, rounded up, with ``in_time``, else T.
    """
    if has_kernels(x_bthwc.device):
        from cogcache.precompute.fused_kernels import add_pool

        return add_pool(x_bthwc, bias_c, residual_bthwc, in_time=in_time)
    total = _add(x_bthwc, bias_c, residual_bthwc)
    if in_time:
        odd = total.shape[1] % 2
        pairs = total[:, odd:].reshape(total.shape[0], -1, 2, *total.shape[2:]).mean(2)
        total = torch.cat([total[:, :odd], pairs], dim=1)
    return functional.pad(total, (0, 0, 0, 1, 0, 1)).to(x_bthwc.dtype)


def _add(x_bthwc: Tensor, bias_c: Tensor, residual_bthwc: Tensor | None) -> Tensor:
    total = x_bthwc.float() + bias_c.float()
    return total if residual_bthwc is None else total + residual_bthwc.float()


def _statistics(value_bthwc: Tensor, norm: torch.nn.GroupNorm) -> Affine:
    b, c = value_bthwc.shape[0], value_bthwc.shape[-1]
    grouped = value_bthwc.reshape(b, -1, norm.num_groups, c // norm.num_groups)
    variance_bg, mean_bg = torch.var_mean(grouped, dim=(1, 3), correction=0)
    spread = (variance_bg + norm.eps).rsqrt().repeat_interleave(c // norm.num_groups, 1)
    scale = norm.weight.float() * spread
    return Affine(scale, norm.bias.float() - mean_bg.repeat_interleave(c // norm.num_groups, 1) * scale)
