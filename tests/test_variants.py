"""What is read from a checkpoint's own configs, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogcache.errors import GeometryError, ModelError
from cogcache.geometry import Size
from cogcache.tiny import Family
from cogcache.variants import Variant, read_variant, weights_dtype

FACTS: dict[Family, dict[str, Any]] = {
    "2b": {
        "positions": "sincos",
        "task": "t2v",
        "native_fps": 8,
        "scaling_factor": 1.15258426,
        "snr_shift_scale": 3,
    },
    "5b": {"positions": "rope", "task": "t2v", "native_fps": 8, "scaling_factor": 0.7, "snr_shift_scale": 1},
    "5b-i2v": {"positions": "rope+learned", "task": "i2v", "native_fps": 8, "ofs": False, "fixed_grid": True},
    "1.5-5b": {
        "positions": "rope",
        "task": "t2v",
        "native_fps": 16,
        "patch_size_t": 2,
        "invert_scale_latents": True,
    },
    "1.5-5b-i2v": {"positions": "rope", "task": "i2v", "native_fps": 16, "ofs": True, "fixed_grid": False},
}


@pytest.mark.parametrize("family", list(FACTS))
def test_facts_of_each_family(tiny_models: Callable[[Family], Path], family: Family) -> None:
    variant = read_variant(tiny_models(family))
    assert {name: getattr(variant, name) for name in FACTS[family]} == FACTS[family]
    assert (variant.spatial_factor, variant.temporal_factor, variant.size_multiple) == (8, 4, 16)
    assert variant.latent_shape(49, Size(480, 720)) == (16, 13, 60, 90)
    assert Variant.model_validate_json(variant.model_dump_json()) == variant


def real(tiny: Variant, **changes: Any) -> Variant:
    return tiny.model_copy(update=changes)


def test_default_sizes(tiny_models: Callable[[Family], Path]) -> None:
    first = real(read_variant(tiny_models("5b")), sample_height=60, sample_width=90)
    assert first.default_size == Size(480, 720)
    second = read_variant(tiny_models("1.5-5b"))
    assert real(second, sample_height=300, sample_width=300).default_size == Size(768, 1360)
    assert second.default_size == second.sample_size  # the card's size does not fit the tiny one


def test_clips_that_a_model_cannot_take(tiny_models: Callable[[Family], Path]) -> None:
    free = read_variant(tiny_models("5b"))
    free.check_clip(81, Size(1024, 1024))
    with pytest.raises(GeometryError, match="41 and 49"):
        free.check_clip(48, Size(64, 96))
    with pytest.raises(GeometryError, match="multiples of 16"):
        free.check_clip(49, Size(64, 100))
    fixed = read_variant(tiny_models("5b-i2v"))
    fixed.check_clip(fixed.sample_frames, fixed.sample_size)
    with pytest.raises(GeometryError, match=f"The only size allowed is {fixed.sample_size}"):
        fixed.check_clip(17, Size(96, 64))
    with pytest.raises(GeometryError, match="The only count allowed is 17"):
        fixed.check_clip(9, fixed.sample_size)
    table = read_variant(tiny_models("1.5-5b"))
    table.check_clip(9, Size(32, 48))
    with pytest.raises(GeometryError, match="larger than this model's position table"):
        table.check_clip(9, Size(64, 112))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("transformer/config.json", {"_class_name": "UNet2DModel"}, "is not a CogVideoX checkpoint"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "is not a CogVideoX checkpoint"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "predict v"),
        ("transformer/config.json", {"num_layers": "many"}, "incomplete CogVideoX config"),
        ("transformer/config.json", {"num_layers": None}, "incomplete CogVideoX config"),
        ("vae/config.json", {"block_out_channels": 5}, "incomplete CogVideoX config"),
        ("scheduler/scheduler_config.json", {"snr_shift_scale": None}, "incomplete CogVideoX config"),
    ],
)
def test_other_models_are_refused(
    tiny_models: Callable[[Family], Path], tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    root = tmp_path / "model"
    for part in ("transformer", "vae", "scheduler"):
        (root / part).mkdir(parents=True)
        for config in (tiny_models("5b") / part).glob("*.json"):
            shutil.copy(config, root / part)
    assert read_variant(root) == read_variant(tiny_models("5b"))
    config = json.loads((root / name).read_text())
    (root / name).write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        read_variant(root)
    config.pop(next(iter(set(change) - {"snr_shift_scale"}), "_class_name"))
    (root / name).write_text(json.dumps(config))
    with pytest.raises(ModelError):
        read_variant(root)


def test_dtype_of_weights(tiny_models: Callable[[Family], Path], tmp_path: Path) -> None:
    assert weights_dtype(tiny_models("5b") / "vae") == "float32"
    for content in (
        b"",
        b"\xff" * 8,
        b"\2\0\0\0\0\0\0\0{}",
        b"\2\0\0\0\0\0\0\0[]",
        b"\4\0\0\0\0\0\0\0{\xff}}",
    ):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            weights_dtype(tmp_path)
