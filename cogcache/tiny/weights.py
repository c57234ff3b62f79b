"""Random weights under which an untrained network still behaves like a trained one in scale.

Gains are fixed numbers, not measured at run time, so that a seed gives the same bytes on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["randomise", "tune_vae"]


def randomise(module: torch.nn.Module, *key: object) -> None:
    """Fill every parameter with draws that depend on ``key`` and its name alone.

    Matrices and kernels: N(0, 1/fan_in). Norm weights: near 1. Biases: near 0. No layer is left at zero, so
    that gradients reach all of them.
    """
    import torch

    from cogcache.draws import generator

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator(*key, name))
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.02 * noise)


# Measured once on natural video, so that latents have a spread near 1 and the decoder fills -1..1.
_MEAN_GAIN = 2.2
_PIXEL_GAIN = 0.5
_LOG_VARIANCE = -6.0


def tune_vae(vae: Any) -> None:
    """Scale the last layers of a randomised ``AutoencoderKLCogVideoX``.

    The posterior gets a mean that depends on the picture and a small variance, as trained ones have.
    """
    import torch

    encoder, decoder = vae.encoder.conv_out.conv, vae.decoder.conv_out.conv
    channels = encoder.out_channels // 2
    with torch.no_grad():
        encoder.weight[:channels] *= _MEAN_GAIN
        encoder.weight[channels:] *= 0.1
        encoder.bias[channels:] += _LOG_VARIANCE
        decoder.weight *= _PIXEL_GAIN
