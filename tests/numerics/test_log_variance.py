"""8-bit log-variances change the loss, and the LoRA's gradient, far less than posterior sampling does.

About 0.03 of it is expected, the root mean square of what rounding does to a standard deviation. Mutations tried, each
caught: 6 bits; codes cut instead of rounded; log-variance of the next channel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogcache.geometry import Size
from cogcache.tiny import Family
from cogcache.train.objective import padded_frames

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from log_variance import change_by_8_bits, loaded

TIMESTEPS = torch.tensor([0, 300, 700, 999])


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("centre", [-2.0, -8.0])
@pytest.mark.parametrize("family", ["5b", "1.5-5b-i2v"])
def test_loss_and_gradient_change_far_less_than_by_posterior_sampling(
    tiny_models: Callable[[Family], Path], family: Family, centre: float
) -> None:
    transformer, scheduler, variant = loaded(tiny_models(family))
    c, f, h, w = variant.latent_shape(9, Size(32, 48))
    b = len(TIMESTEPS)
    means, logvar = normal(b, c, f, h, w, seed=0), normal(b, c, f, h, w, seed=1) + centre
    image = {"image_latents_bcfhw": normal(b, c, 1, h, w, seed=2)} if variant.task == "i2v" else {}
    change = change_by_8_bits(
        transformer,
        scheduler,
        torch.cat([means, logvar], 1).bfloat16(),
        draws=10,
        prompt_embeds_bld=normal(b, variant.text_length, variant.text_dim, seed=3),
        noise_bpchw=normal(b, padded_frames(f, variant.patch_size_t), c, h, w, seed=4),
        timesteps_b=TIMESTEPS,
        variant=variant,
        **image,
    )
    assert change.loss.shape == (b,)
    assert change.loss.min() > 0
    assert change.loss.max() < 0.1
    assert change.loss.mean() < 0.04
    assert 0.005 < change.gradient < 0.04
    assert change.spread.min() > 0
