"""Frozen weights in 8 bits: whole numbers from -127 to 127, with one scale for each run of a row's values.

The largest of a run is hit exactly; the others are rounded to the nearest of 255 steps, as "absmax" quantization has it
(Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021). For values of a normal distribution and runs of
128 that is an error of 0.6% of their size, and memory of 8.25 bits a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Int8", "int8_size", "no_values", "put_in_int8", "quantize", "values_of"]

_RUN = 128
_STEPS = 127
_NAME = "int8"


@dataclass
class Int8:
    """A matrix in 8 bits: ``steps`` int8 [runs, length of a run] times ``scales`` float32 [runs, 1]."""

    steps: Tensor
    scales: Tensor

    def forget(self) -> None:
        """Let go of the memory: the values have been put elsewhere."""
        self.steps, self.scales = self.steps.new_empty(0), self.scales.new_empty(0)

    def read(self, out: Tensor) -> None:
        """Write the values into ``out``, a contiguous floating tensor of as many, on the same device."""
        torch.mul(self.steps, self.scales, out=out.view(self.steps.shape))


def quantize(matrix: Tensor) -> Int8:
    """Round a floating matrix [rows, columns] to 8 bits, on its device. Values must be finite."""
    runs = matrix.reshape(-1, _run(matrix)).float()
    scales = runs.abs().amax(dim=1, keepdim=True).div_(_STEPS)
    safe = scales.where(scales > 0, torch.ones_like(scales))
    return Int8((runs / safe).round_().to(torch.int8), scales)


def _run(matrix: Tensor) -> int:
    """Length of a run: that many values divide a row."""
    return math.gcd(_RUN, matrix.shape[-1])


def int8_size(matrix: Tensor) -> tuple[int, int]:
    """Bytes of the steps and of the scales of a matrix, which may lie on the meta device."""
    return matrix.numel(), 4 * (matrix.numel() // _run(matrix))


def put_in_int8(parameter: nn.Parameter, home: torch.device) -> None:
    """Take a frozen matrix's values out of ``parameter`` and lay them down in 8 bits on ``home``.

    It keeps its shape and dtype; whoever reads it all the same finds NaN. :func:`values_of` has the values. Nothing
    happens to one that has been put there before.
    """
    if values_of(parameter) is not None:
        return
    found = quantize(parameter.data)
    parameter.data = no_values(parameter.shape, parameter.dtype)
    setattr(parameter, _NAME, Int8(found.steps.to(home), found.scales.to(home)))


def no_values(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """NaN of that shape, in the memory of one."""
    return torch.full((), math.nan, dtype=dtype).expand(shape)


def values_of(parameter: nn.Parameter) -> Int8 | None:
    """What :func:`put_in_int8` put aside; None for other parameters."""
    values: Int8 | None = getattr(parameter, _NAME, None)
    return values
