"""The Triton kernels behind :mod:`cogcache.precompute.fused`. Needs CUDA.

All are bound by memory: each reads its inputs once and writes its result once, rows of C channels at a time. Sums are
float32, in a fixed order, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_pool", "apply", "statistics"]

_TILE = 8192
"""Elements a program holds at once."""
_TILES = 16
"""Tiles one program of the statistics goes through."""


def statistics(
    x_bthwc: Tensor, bias_c: Tensor, residual_bthwc: Tensor | None, norm: torch.nn.GroupNorm, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, scale and shift: see ``fused.add`` (``keep``) and ``fused.norm_statistics``."""
    b, c = x_bthwc.shape[0], x_bthwc.shape[-1]
    rows = x_bthwc[0].numel() // c
    width = triton.next_power_of_2(c)
    height = max(1, _TILE // width)
    parts = triton.cdiv(rows, height * _TILES)
    means, squares = (x_bthwc.new_empty((b, parts, c), dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(x_bthwc) if keep else x_bthwc
    residual = x_bthwc if residual_bthwc is None else residual_bthwc
    _partial[(parts, b)](
        x_bthwc, bias_c, residual, out, means, squares, rows, c,
        HEIGHT=height, WIDTH=width, TILES=_TILES, RESIDUAL=residual_bthwc is not None, KEEP=keep, num_warps=8,
    )  # fmt: skip
    scale, shift = (x_bthwc.new_empty((b, c), dtype=torch.float32) for _ in range(2))
    _finish[(norm.num_groups, b)](
        means, squares, norm.weight, norm.bias, scale, shift, rows, parts, c, norm.eps,
        GROUP=c // norm.num_groups, SPAN=height * _TILES, PARTS=512, num_warps=4,
    )  # fmt: skip
    return out, scale, shift


def apply(
    x_bthwc: Tensor, bias_c: Tensor | None, scale_bc: Tensor, shift_bc: Tensor, cached_bthwc: Tensor | None
) -> Tensor:
    """See ``fused.norm_silu``."""
    b, t, h, w, c = x_bthwc.shape
    out = x_bthwc.new_empty((b, t + 2, h, w, c))
    if cached_bthwc is not None:
        out[:, :2] = cached_bthwc
    width = triton.next_power_of_2(c)
    height = max(1, _TILE // width)
    rows = t * h * w
    _apply[(triton.cdiv(rows, height), b)](
        x_bthwc, x_bthwc if bias_c is None else bias_c, scale_bc, shift_bc, out, rows, h * w, c,
        HEIGHT=height, WIDTH=width, BIAS=bias_c is not None, FIRST=cached_bthwc is None, num_warps=8,
    )  # fmt: skip
    return out


def add_pool(x_bthwc: Tensor, bias_c: Tensor, residual_bthwc: Tensor, *, in_time: bool) -> Tensor:
    """See ``fused.add_and_pool``."""
    b, t, h, w, c = x_bthwc.shape
    frames = (t + 1) // 2 if in_time else t
    out = x_bthwc.new_empty((b, frames, h + 1, w + 1, c))
    width = triton.next_power_of_2(c)
    height = max(1, _TILE // width)
    _add_pool[(triton.cdiv(frames * (h + 1) * (w + 1), height), b)](
        x_bthwc, bias_c, residual_bthwc, out, t, frames, h, w, c,
        HEIGHT=height, WIDTH=width, POOL=in_time, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _partial(
    x, bias, residual, out, means, squares, rows, c,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    part, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    known = channels < c
    shift = tl.load(bias + channels, mask=known, other=0.0).to(tl.float32)
    first = part.to(tl.int64) * (HEIGHT * TILES)
    base = batch * rows * c
    # Deviations from the part's first row: the mean may be far larger than the spread.
    pivot = tl.load(x + base + first * c + channels, mask=known, other=0.0).to(tl.float32) + shift
    if RESIDUAL:
        pivot += tl.load(residual + base + first * c + channels, mask=known, other=0.0).to(tl.float32)
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    powers = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for tile in range(TILES):
        row = first + tile * HEIGHT + tl.arange(0, HEIGHT)
        mask = (row < rows)[:, None] & known[None, :]
        place = base + row[:, None] * c + channels[None, :]
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) + shift[None, :]
        if RESIDUAL:
            value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        if KEEP:
            kept = value.to(out.dtype.element_ty)
            tl.store(out + place, kept, mask=mask)
            value = kept.to(tl.float32)
        away = tl.where(mask, value - pivot[None, :], 0.0)
        sums += away
        powers += away * away
    count = tl.minimum(rows - first, HEIGHT * TILES).to(tl.float32)
    total = tl.sum(sums, 0)
    place = (batch * tl.num_programs(0) + part) * c + channels
    tl.store(means + place, pivot + total / count, mask=known)
    tl.store(squares + place, tl.sum(powers, 0) - total * total / count, mask=known)


@triton.jit
def _finish(
    means, squares, weight, bias, scale, shift, rows, parts, c, eps,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Join the parts' means and sums of squared deviations (Chan, Golub and LeVeque 1979), over a group's channels."""
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = group * GROUP + tl.arange(0, GROUP)
    base = batch * parts * c
    total = tl.zeros((PARTS, GROUP), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (channels < c)[None, :]
        count = tl.minimum(rows - part.to(tl.int64) * SPAN, SPAN).to(tl.float32)
        place = base + part[:, None] * c + channels[None, :]
        total += tl.where(mask, tl.load(means + place, mask=mask, other=0.0) * count[:, None], 0.0)
    values = rows.to(tl.float32) * GROUP
    mean = tl.sum(total) / values
    total = tl.zeros((PARTS, GROUP), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (channels < c)[None, :]
        count = tl.minimum(rows - part.to(tl.int64) * SPAN, SPAN).to(tl.float32)
        place = base + part[:, None] * c + channels[None, :]
        away = tl.load(means + place, mask=mask, other=0.0) - mean
        inside = tl.load(squares + place, mask=mask, other=0.0)
        total += tl.where(mask, inside + away * away * count[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(total) / values + eps)
    factor = tl.load(weight + channels).to(tl.float32) * spread
    tl.store(scale + batch * c + channels, factor)
    tl.store(shift + batch * c + channels, tl.load(bias + channels).to(tl.float32) - mean * factor)


@triton.jit
def _apply(
    x, bias, scale, shift, out, rows, area, c,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    channels = tl.arange(0, WIDTH)
    known = channels < c
    mask = (row < rows)[:, None] & known[None, :]
    place = row[:, None] * c + channels[None, :]
    value = tl.load(x + batch * rows * c + place, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + channels, mask=known, other=0.0).to(tl.float32)[None, :]
    factor = tl.load(scale + batch * c + channels, mask=known, other=0.0)
    value = value * factor[None, :] + tl.load(shift + batch * c + channels, mask=known, other=0.0)[None, :]
    value = (value * tl.sigmoid(value)).to(out.dtype.element_ty)
    target = out + batch * (rows + 2 * area) * c
    tl.store(target + 2 * area * c + place, value, mask=mask)
    if FIRST:  # the first frame stands for the two before it
        start = mask & (row < area)[:, None]
        tl.store(target + place, value, mask=start)
        tl.store(target + area * c + place, value, mask=start)


@triton.jit
def _add_pool(
    x, bias, residual, out, t, frames, h, w, c,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    channels = tl.arange(0, WIDTH)
    known = channels < c
    area = (h + 1) * (w + 1)
    frame, rest = row // area, row % area
    y, x_place = rest // (w + 1), rest % (w + 1)
    inside = (frame < frames) & (y < h) & (x_place < w)
    mask = inside[:, None] & known[None, :]
    base = batch * t * h * w * c
    shift = tl.load(bias + channels, mask=known, other=0.0).to(tl.float32)
    odd = t % 2
    source = tl.where(frame < odd, frame, 2 * frame - odd) if POOL else frame
    place = base + ((source * h + y) * w + x_place)[:, None] * c + channels[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    if POOL:
        pair = mask & (frame >= odd)[:, None]
        place += h * w * c
        other = tl.load(x + place, mask=pair, other=0.0).to(tl.float32)
        other += tl.load(residual + place, mask=pair, other=0.0).to(tl.float32)
        value = tl.where(pair, (value + other) * 0.5, value)
    value = tl.where(mask, value + shift[None, :], 0.0)
    target = out + batch * frames * area * c + row[:, None] * c + channels[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=(frame < frames)[:, None] & known[None, :])
