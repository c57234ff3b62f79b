"""What infer refuses, before any weights are loaded, and what it only warns about."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cogcache.config import InferConfig
from cogcache.errors import CogcacheError, ConfigError, GeometryError, LoraError, ModelError, StorageError
from cogcache.infer import infer
from cogcache.infer.plan import plan_inference
from cogcache.tiny import Family

Models = Callable[[Family], Path]
MakeLora = Callable[..., Path]


def plan(**settings: Any) -> Any:
    return plan_inference(InferConfig(**{"prompt": ["x"], **settings}))


def foreign(path: Path) -> Path:
    """The same LoRA without any metadata, as the reference trainer writes it."""
    target = path.with_name("foreign.safetensors")
    save_file(load_file(path), target)
    return target


def test_lora_of_another_family_names_what_differs(tiny_models: Models, make_lora: MakeLora) -> None:
    with pytest.raises(LoraError) as caught:
        plan(lora=make_lora("2b"), model=str(tiny_models("1.5-5b")))
    text = str(caught.value)
    for fact in ("num_layers 2 is not 3", "patch_size_t None is not 2", "positions 'sincos' is not 'rope'"):
        assert fact in text
    assert "sample_height" not in text
    assert str(tiny_models("2b")) in text


def test_a_familys_noise_facts_count_even_where_shapes_agree(
    tiny_models: Models, make_lora: MakeLora, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_models("2b"), other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"snr_shift_scale": 3.0', '"snr_shift_scale": 1.0'))
    with pytest.raises(LoraError, match=r"snr_shift_scale 3\.0 is not 1\.0"):
        plan(lora=make_lora("2b"), model=str(other))


def test_foreign_lora_of_another_shape_is_refused(tiny_models: Models, make_lora: MakeLora) -> None:
    with pytest.raises(LoraError, match=r"lora_A is \[4, 64\], and the layer's weight \[96, 96\]"):
        plan(lora=foreign(make_lora("2b")), model=str(tiny_models("5b")))


def test_foreign_lora_with_more_layers_is_refused(tiny_models: Models, make_lora: MakeLora) -> None:
    path = make_lora("2b")
    tensors = {name.replace("blocks.1.", "blocks.7."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(LoraError, match=r"no layer transformer_blocks\.7\.attn1\.to_"):
        plan(lora=path, model=str(tiny_models("2b")))


def test_foreign_lora_works_with_a_warning(
    tiny_models: Models, make_lora: MakeLora, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = foreign(make_lora("2b"))
    with pytest.raises(ConfigError, match="--model"):
        plan(lora=path)
    settings = {"lora": path, "model": str(tiny_models("2b")), "frames": 9, "size": "32x48", "steps": 1}
    infer(InferConfig(prompt=["x"], output=tmp_path / "out.mp4", **settings))
    assert "does not say its alpha" in caplog.text
    assert "alpha = rank = 4" in caplog.text


def test_lora_whose_model_has_moved(make_lora: MakeLora) -> None:
    with pytest.raises(ModelError, match=r"was trained on cannot be used.*--model"):
        plan(lora=make_lora(base_model="/nowhere/model"))


def test_image_to_video_models_are_refused_plainly(tiny_models: Models) -> None:
    with pytest.raises(ConfigError, match="image-to-video"):
        plan(model=str(tiny_models("1.5-5b-i2v")))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"frames": 16}, GeometryError),
        ({"size": "30x48"}, GeometryError),
        ({"size": "large"}, GeometryError),
        ({"output": Path("clip.gif")}, ConfigError),
        ({"prompts_file": Path("nowhere.txt")}, ConfigError),
        ({"lora": Path("nowhere.safetensors")}, LoraError),
        ({"model": "/nowhere/model"}, ModelError),
    ],
)
def test_wrong_settings(tiny_models: Models, settings: dict[str, Any], error: type[CogcacheError]) -> None:
    with pytest.raises(error):
        plan(**{"model": str(tiny_models("2b")), **settings})


def test_a_prompts_file_without_prompts(tiny_models: Models, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n  \n")
    with pytest.raises(ConfigError, match="no prompts"):
        plan(model=str(tiny_models("2b")), prompt=[], prompts_file=tmp_path / "prompts.txt")


def test_output_that_cannot_be_written(tiny_models: Models, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    config = InferConfig(model=str(tiny_models("2b")), prompt=["x"], output=tmp_path / "file" / "out.mp4")
    with pytest.raises(StorageError):
        infer(config)


def test_pickled_weights_are_never_loaded(tiny_models: Models, tmp_path: Path) -> None:
    """A base model that holds only pickles is refused by its headers."""
    other = tmp_path / "pickled"
    shutil.copytree(tiny_models("2b"), other)
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        plan(model=str(other))


def test_dora_is_not_run_beside_a_sequentially_offloaded_model(make_lora: MakeLora) -> None:
    lora = make_lora("2b", dora=True)
    with pytest.raises(ConfigError, match="cannot run a DoRA"):
        plan(lora=lora, offload="sequential")
    assert plan(lora=lora, offload="sequential", fuse=True).lora
    assert plan(lora=lora, offload="model").lora
    assert plan(lora=make_lora("2b"), offload="sequential").lora
