"""Tiled decoding: on where it is needed and right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogcache.config import InferConfig
from cogcache.infer.pipeline import load_pipeline
from cogcache.infer.plan import plan_inference
from cogcache.tiling import tiles_join
from cogcache.tiny import Family

Models = Callable[[Family], Path]


@pytest.mark.parametrize("tile", [(48, 80), (32, 48), (48, 64), (96, 80), (64, 80)])
def test_tiles_join_foretells_the_size_that_diffusers_returns(
    tiny_models: Models, tile: tuple[int, int]
) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_models("2b"), subfolder="vae")
    vae.enable_tiling(*tile)
    with torch.no_grad():
        decoded = vae.decode(torch.zeros(1, 16, 1, 26, 26)).sample
    assert tiles_join(vae) == (decoded.shape[-2:] == (208, 208))


def test_the_real_tile_sizes_join() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1)
    assert (vae.tile_sample_min_height, vae.tile_sample_min_width) == (240, 360)
    assert tiles_join(vae)


def pipeline(root: Path, size: str, tiling: bool = True) -> AutoencoderKLCogVideoX:
    return load_pipeline(
        plan_inference(InferConfig(model=str(root), prompt=["x"], size=size, tiling=tiling))
    ).vae


def test_only_pictures_larger_than_a_tile_are_tiled(tiny_models: Models) -> None:
    root = tiny_models("2b")
    assert pipeline(root, "64x96").use_tiling
    assert pipeline(root, "64x80").use_tiling
    assert pipeline(root, "48x96").use_tiling
    assert not pipeline(root, "48x80").use_tiling
    assert not pipeline(root, "64x96", tiling=False).use_tiling


def test_tiles_that_leave_gaps_are_not_used(
    tiny_models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_models("2b"), other)
    config = other / "vae" / "config.json"
    config.write_text(config.read_text().replace('"sample_height": 96', '"sample_height": 64'))
    assert not pipeline(other, "64x96").use_tiling
    assert "tiles of 32x80 do not join" in caplog.text
