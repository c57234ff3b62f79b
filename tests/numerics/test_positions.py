"""Rotary positions against the stock pipelines' own method.

Mutations tried, each caught: slice positions for 1.0 models; frames not divided by ``patch_size_t``; truncation
instead of rounding in the crop region. (The current grid as ``max_size`` for 1.5 changes nothing: a slice of a longer
range is the same range.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

from cogcache.errors import GeometryError
from cogcache.geometry import Size, latent_frames
from cogcache.tiny import FAMILIES, Family
from cogcache.train.objective import padded_frames
from cogcache.train.positions import rotary_tables
from cogcache.variants import Variant, read_variant

CPU = torch.device("cpu")
REAL_GRIDS = {"1.0": (60, 90), "1.5": (96, 170)}


def pipeline_tables(variant: Variant, frames: int, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """What the stock pipeline computes for padded latent ``frames``; its method reads these facts alone."""
    pipeline = CogVideoXImageToVideoPipeline if variant.task == "i2v" else CogVideoXPipeline
    host: Any = SimpleNamespace(
        vae_scale_factor_spatial=variant.spatial_factor,
        transformer=SimpleNamespace(config=SimpleNamespace(**variant.model_dump())),
    )
    return pipeline._prepare_rotary_positional_embeddings(host, size.height, size.width, frames, CPU)


def check(variant: Variant, video_frames: int, size: Size) -> None:
    frames = padded_frames(latent_frames(video_frames), variant.patch_size_t)
    ours = rotary_tables(variant, frames, size.height // 8, size.width // 8, CPU)
    theirs = pipeline_tables(variant, frames, size)
    assert ours is not None
    tokens = -(-frames // (variant.patch_size_t or 1)) * (size.height // 16) * (size.width // 16)
    for table, expected in zip(ours, theirs, strict=True):
        assert table.shape == (tokens, variant.attention_head_dim)
        assert torch.equal(table, expected)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "2b"])
@pytest.mark.parametrize("size", [Size(64, 96), Size(32, 80), Size(48, 32), Size(64, 64), Size(16, 96)])
@pytest.mark.parametrize("frames", [9, 17, 49, 81])
def test_tables_are_the_pipelines(
    tiny_models: Callable[[Family], Path], family: Family, size: Size, frames: int
) -> None:
    check(read_variant(tiny_models(family)), frames, size)


@pytest.mark.parametrize(
    ("generation", "family", "frames", "size"),
    [
        ("1.0", "5b", 49, Size(480, 720)),
        ("1.0", "5b", 49, Size(720, 480)),
        ("1.0", "5b", 81, Size(256, 256)),
        ("1.0", "5b", 49, Size(448, 640)),
        ("1.0", "5b", 49, Size(272, 480)),
        ("1.5", "1.5-5b", 81, Size(768, 1360)),
        ("1.5", "1.5-5b", 49, Size(480, 720)),
        ("1.5", "1.5-5b", 81, Size(768, 768)),
    ],
)
def test_tables_at_real_sizes(
    tiny_models: Callable[[Family], Path], generation: str, family: Family, frames: int, size: Size
) -> None:
    height, width = REAL_GRIDS[generation]
    facts = {"sample_height": height, "sample_width": width, "sample_frames": 81}
    check(read_variant(tiny_models(family)).model_copy(update=facts), frames, size)


def test_models_with_added_positions_get_no_tables(tiny_models: Callable[[Family], Path]) -> None:
    assert rotary_tables(read_variant(tiny_models("2b")), 3, 8, 12, CPU) is None


def test_a_grid_beyond_the_positions_of_a_slice_model_is_refused(
    tiny_models: Callable[[Family], Path],
) -> None:
    with pytest.raises(GeometryError, match="up to 64x96, not for 80x96"):
        rotary_tables(read_variant(tiny_models("1.5-5b")), 4, 10, 12, CPU)


def test_tables_made_under_inference_mode_serve_training(tiny_models: Callable[[Family], Path]) -> None:
    variant = read_variant(tiny_models("5b"))
    with torch.inference_mode():
        tables = rotary_tables(variant, 7, 4, 6, CPU)
    assert tables is not None
    assert not tables[0].is_inference()
