"""A fine-tuned transformer in the place of the base model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogcache.config import InferConfig
from cogcache.config_io import load_config
from cogcache.errors import ConfigError, ModelError
from cogcache.infer.pipeline import load_pipeline
from cogcache.infer.plan import plan_inference
from cogcache.tiny import Family
from cogcache.variants import read_variant

Models = Callable[[Family], Path]
MakeFinetuned = Callable[..., Path]


@pytest.fixture
def make_finetuned(tiny_models: Models, tmp_path: Path) -> MakeFinetuned:
    """A folder as training of all weights leaves it, of a transformer with other weights than the base."""

    def make(family: Family = "5b", *, record: bool = True, dtype: torch.dtype = torch.float32) -> Path:
        root = tiny_models(family)
        transformer = CogVideoXTransformer3DModel.from_pretrained(root, subfolder="transformer")
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(0.01)
        folder = tmp_path / f"finetuned-{family}"
        torch.nn.Module.to(transformer, dtype).save_pretrained(folder / "transformer")
        if record:
            said = {"base_model": str(root), "variant": read_variant(root).model_dump(mode="json"),
                    "fingerprint": "0", "frames": 9, "size": "32x48", "fps": 12.0}  # fmt: skip
            (folder / "cogcache.json").write_text(json.dumps({"training_type": "full", **said}))
        return folder

    return make


def config(**values: Any) -> InferConfig:
    return InferConfig(**{"prompt": ["a"], "device": "cpu", "steps": 1, **values})


def test_its_weights_precision_and_geometry_are_taken(
    make_finetuned: MakeFinetuned, tiny_models: Models
) -> None:
    folder = make_finetuned(dtype=torch.bfloat16)
    plan = plan_inference(config(transformer=folder))
    assert plan.model == tiny_models("5b")
    assert (plan.frames, str(plan.size), plan.fps, plan.dtype) == (9, "32x48", 12.0, "bfloat16")
    pipe = load_pipeline(plan)
    theirs = CogVideoXTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=torch.bfloat16
    ).state_dict()
    ours = pipe.transformer.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert pipe.vae.dtype == torch.bfloat16


def test_the_base_needs_no_transformer_weights(
    make_finetuned: MakeFinetuned, tiny_models: Models, tmp_path: Path
) -> None:
    import shutil

    bare = shutil.copytree(tiny_models("5b"), tmp_path / "bare")
    for path in (bare / "transformer").glob("*.safetensors"):
        path.unlink()
    plan = plan_inference(config(transformer=make_finetuned(record=False), model=str(bare), size="32x48"))
    assert plan.fps == 8.0
    assert load_pipeline(plan).transformer.training is False


def test_what_does_not_fit_is_refused(
    make_finetuned: MakeFinetuned, tiny_models: Models, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="holds no fine-tuned transformer"):
        plan_inference(config(transformer=tmp_path))
    with pytest.raises(ModelError, match="another kind of transformer than that of"):
        plan_inference(config(transformer=make_finetuned("5b"), model=str(tiny_models("1.5-5b"))))
    nameless = make_finetuned("2b", record=False)
    with pytest.raises(ConfigError, match="does not say which model"):
        plan_inference(config(transformer=nameless))
    (nameless / "cogcache.json").write_text('{"frames": "many"}')
    with pytest.raises(ModelError, match=r"cogcache\.json is damaged: frames"):
        plan_inference(config(transformer=nameless))
    with pytest.raises(ConfigError, match="give --lora or --transformer"):
        load_config(InferConfig, {"prompt": ["a"]})
