"""The VAE's encoder for GPUs: the arithmetic of diffusers' ``CogVideoXEncoder3D`` in fewer passes over memory.

The convolutions take half of the time of diffusers' encoder; the rest is traffic between them. Here activations lie
channels-last, norm and activation write straight into the buffer that the next causal convolution reads (which begins
with the two cached frames, so nothing is concatenated), and bias, residual sum and the statistics of the next norm
share one pass. Sums and norms are float32 and rounded once, so with 16-bit weights the result is as near to that of
float32 as diffusers' own or nearer. Nothing is specialised to a size, so nothing is compiled anew for another bucket.

The two agree up to rounding; :func:`can_take_over` names what an encoder must be for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cogcache.precompute.fused import Affine, add, add_and_pool, norm_silu, norm_statistics

__all__ = ["FastEncoder", "can_take_over"]

Caches = dict[str, Tensor]
"""From a causal convolution's name to the last two frames of its input, ``[B, 2, H, W, C]``."""

_INPUT_CHANNELS = 8
"""Pixels are given so many channels, the rest zeros: matrix units take 16-bit channels in eights."""
_LARGEST = 2**31 - 1
"""Elements of a convolution's input; beyond that it is done in parts, for cuDNN counts in 32 bits."""


def can_take_over(encoder: nn.Module) -> bool:
    """Whether ``encoder`` is built as those of CogVideoX: causal, zero-padded, SiLU, plain group norms."""
    convolutions = [module for module in encoder.modules() if hasattr(module, "pad_mode")]
    norms = [module for module in encoder.modules() if isinstance(module, nn.GroupNorm)]
    resnets = [module for module in encoder.modules() if hasattr(module, "use_conv_shortcut")]
    return (
        all(module.pad_mode == "first" and module.time_kernel_size == 3 for module in convolutions)
        and all(_is_power_of_two(norm.num_channels // norm.num_groups) and norm.affine for norm in norms)
        and all(
            isinstance(module.nonlinearity, nn.SiLU) and not module.use_conv_shortcut for module in resnets
        )
        and not any(hasattr(module, "temb_proj") for module in resnets)
    )


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


class FastEncoder(nn.Module):
    """Takes the place of ``AutoencoderKLCogVideoX.encoder``; for inference alone.

    Args:
        encoder: Whose weights are used; see :func:`can_take_over`. Its weights are laid out channels-last.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        first = encoder.conv_in.conv
        missing = _INPUT_CHANNELS - first.in_channels
        first.weight = nn.Parameter(
            functional.pad(first.weight, (0,) * 6 + (0, missing)), requires_grad=False
        )
        for module in encoder.modules():
            if isinstance(module, nn.Conv3d | nn.Conv2d):
                form = torch.channels_last_3d if isinstance(module, nn.Conv3d) else torch.channels_last
                module.weight.data = module.weight.data.contiguous(memory_format=form)

    def forward(
        self, sample: Tensor, temb: Tensor | None = None, conv_cache: Caches | None = None
    ) -> tuple[Tensor, Caches]:
        """Encode a run of frames as diffusers' encoder does.

        Args:
            sample: Pixels ``[B, 3, T, H, W]``.
            conv_cache: What the frames before left.

        Returns:
            ``[B, 2C, T', H/8, W/8]`` and what the next frames need.
        """
        assert temb is None  # diffusers' signature has it; the VAE never gives it
        run = _Run(conv_cache)
        pixels_bthwc = functional.pad(sample.permute(0, 2, 3, 4, 1), (0, _INPUT_CHANNELS - sample.shape[1]))
        state = run.pixels(self.encoder.conv_in, pixels_bthwc)
        for place, block in enumerate([*self.encoder.down_blocks, self.encoder.mid_block]):
            for number, resnet in enumerate(block.resnets):
                state = run.resnet(f"{place}.{number}", resnet, state)
            for down in getattr(block, "downsamplers", None) or ():
                state = _downsample(down, state)
        x, affine = add(*state, self.encoder.norm_out)
        x = run.after_norm("conv_out", self.encoder.conv_out, x, None, affine)
        return (x + self.encoder.conv_out.conv.bias).permute(0, 4, 1, 2, 3), run.left


class _Sum(NamedTuple):
    """Activations ``x + bias + residual`` that were not added up yet; whoever reads them next does."""

    x_bthwc: Tensor
    bias_c: Tensor
    residual_bthwc: Tensor | None


class _Run:
    """The causal convolutions of one call: what the frames before left, and what these leave."""

    def __init__(self, caches: Caches | None) -> None:
        self.left = Caches()
        self._caches = (
            {} if caches is None else caches
        )  # emptied on the way, so that both are never held whole

    def pixels(self, conv: Any, pixels_bthwc: Tensor) -> _Sum:
        """The first convolution."""
        first = pixels_bthwc[:, :1]
        before = self._caches.pop("conv_in", None)
        parts = [first, first, pixels_bthwc] if before is None else [before, pixels_bthwc]
        return _Sum(self._convolve("conv_in", conv, torch.cat(parts, dim=1)), conv.conv.bias, None)

    def resnet(self, name: str, resnet: Any, state: _Sum) -> _Sum:
        """Two causal convolutions behind norm and SiLU, and the way around them."""
        x, affine = add(*state, resnet.norm1)
        around = x if resnet.in_channels == resnet.out_channels else _shortcut(resnet.conv_shortcut, x)
        x = self.after_norm(f"{name}.1", resnet.conv1, x, None, affine)
        bias = resnet.conv1.conv.bias
        affine = norm_statistics(x, bias, resnet.norm2)
        x = self.after_norm(f"{name}.2", resnet.conv2, x, bias, affine)
        return _Sum(x, resnet.conv2.conv.bias, around)

    def after_norm(
        self, name: str, conv: Any, x_bthwc: Tensor, bias_c: Tensor | None, affine: Affine
    ) -> Tensor:
        """Norm, SiLU and the causal convolution without its bias."""
        return self._convolve(name, conv, norm_silu(x_bthwc, bias_c, affine, self._caches.pop(name, None)))

    def _convolve(self, name: str, conv: Any, input_bthwc: Tensor) -> Tensor:
        """The convolution without its bias, of frames behind the two before them."""
        self.left[name] = input_bthwc[:, -2:].clone()
        parts = -(-input_bthwc.numel() // _LARGEST)
        frames = -(-(input_bthwc.shape[1] - 2) // parts)
        done = [
            _convolve(input_bthwc[:, start : start + frames + 2], conv.conv.weight)
            for start in range(0, input_bthwc.shape[1] - 2, frames)
        ]
        return done[0] if len(done) == 1 else torch.cat(done, dim=1)


def _convolve(input_bthwc: Tensor, weight: Tensor) -> Tensor:
    output = functional.conv3d(input_bthwc.permute(0, 4, 1, 2, 3), weight, padding=(0, 1, 1))
    return output.permute(0, 2, 3, 4, 1).contiguous()


def _downsample(down: Any, state: _Sum) -> _Sum:
    """Half of the frames, where the block does that, and half of each picture."""
    assert state.residual_bthwc is not None
    x = add_and_pool(state.x_bthwc, state.bias_c, state.residual_bthwc, in_time=down.compress_time)
    return _Sum(_convolve_frames(x, down.conv), down.conv.bias, None)


def _convolve_frames(x_bthwc: Tensor, conv: nn.Conv2d) -> Tensor:
    frames = x_bthwc.flatten(0, 1).permute(0, 3, 1, 2)
    output = functional.conv2d(frames, conv.weight, stride=conv.stride, padding=conv.padding)
    frames_first = output.permute(0, 2, 3, 1).contiguous()
    return frames_first.view(*x_bthwc.shape[:2], *frames_first.shape[1:])


def _shortcut(conv: nn.Conv3d, x_bthwc: Tensor) -> Tensor:
    return functional.linear(x_bthwc, conv.weight.flatten(1), conv.bias)
