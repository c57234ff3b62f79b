"""Resizing, cropping and padding one picture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogcache.geometry import Size, plan_fit
from cogcache.pictures import fit_frame


def noise(height: int, width: int) -> torch.Tensor:
    """A picture with both detail and flat areas."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")[0].permute(1, 2, 0)
    grain = torch.rand(height, width, 3, generator=generator) * 0.2
    return ((smooth * 0.8 + grain) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [Size(48, 80), Size(160, 272), Size(96, 96), Size(400, 720)])
def test_uint8_resampling_is_as_good_as_float(mode: str, target: Size) -> None:
    frame = noise(240, 432)
    got = fit_frame(frame, plan_fit(Size(240, 432), target, "stretch"), mode)
    exact = F.interpolate(
        frame.permute(2, 0, 1)[None].float(), size=(target.height, target.width), mode=mode, antialias=True
    )
    error = (got.float() - exact[0].permute(1, 2, 0).clamp(0, 255)).abs()
    assert error.mean() < 0.5
    assert error.max() < 4


def test_downscaling_is_antialiased() -> None:
    stripes = torch.zeros(64, 64, 3, dtype=torch.uint8)
    stripes[:, ::2] = 255
    small = fit_frame(stripes, plan_fit(Size(64, 64), Size(16, 16), "cover"), "bicubic")
    assert small[2:-2, 2:-2].float().sub(127.5).abs().max() < 8


def test_cover_crops_the_centre_and_pad_shows_all() -> None:
    frame = torch.full((60, 120, 3), 10, dtype=torch.uint8)
    frame[:, 30:90] = 200
    cover = fit_frame(frame, plan_fit(Size(60, 120), Size(60, 60), "cover"), "bicubic")
    assert cover.shape == (60, 60, 3)
    assert cover.is_contiguous()
    assert (cover == 200).all()
    pad = fit_frame(frame, plan_fit(Size(60, 120), Size(120, 120), "pad"), "bicubic")
    assert (pad[:30] == 0).all()
    assert (pad[90:] == 0).all()
    assert torch.equal(pad[30:90], frame)


def test_anamorphic_pixels_are_evened_out() -> None:
    """A disc stored 50% too narrow is round again."""
    y, x = torch.meshgrid(torch.arange(80) - 39.5, torch.arange(80) - 39.5, indexing="ij")
    stored = (((y / 30) ** 2 + (x / 15) ** 2) < 1).to(torch.uint8)[..., None].repeat(1, 1, 3) * 255
    shown = fit_frame(stored, plan_fit(Size(80, 160), Size(80, 96), "cover"), "bicubic")[..., 0] > 127
    assert abs(int(shown.any(0).sum()) - int(shown.any(1).sum())) <= 1
