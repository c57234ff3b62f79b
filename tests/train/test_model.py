"""The frozen base and its LoRA."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogcache.config import TrainConfig
from cogcache.errors import CheckpointError, ConfigError, ModelError
from cogcache.tiny import Family, build_tiny_model
from cogcache.train.model import (
    add_lora,
    base_dtype,
    load_lora_state,
    load_scheduler,
    load_transformer,
    lora_state,
    trainable,
)
from cogcache.variants import read_variant

Models = Callable[[Family], Path]
Settings = Callable[..., TrainConfig]


def with_lora(root: Path, config: TrainConfig, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    transformer = load_transformer(root, dtype)
    add_lora(transformer, config)
    return transformer


def test_only_the_lora_is_trained_in_float32_whatever_the_base(
    tiny_models: Models, settings: Settings
) -> None:
    transformer = with_lora(tiny_models("5b"), settings(rank=3), torch.bfloat16)
    names = trainable(transformer)
    assert len(names) == 3 * 4 * 2
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in names.items())
    frozen = [p for p in transformer.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert all(p.abs().max() == 0 for name, p in names.items() if "lora_B" in name)


def test_the_start_depends_on_the_seed_alone(tiny_models: Models, settings: Settings) -> None:
    def start(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed())
        return lora_state(with_lora(tiny_models("2b"), settings(seed=seed), dtype))

    first, again, low, other = start(1), start(1), start(1, torch.bfloat16), start(2)
    assert all(
        torch.equal(first[name], again[name]) and torch.equal(first[name], low[name]) for name in first
    )
    down = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in down)
    assert len({first[name].sum().item() for name in down}) == len(down)


def test_kaiming_bound_of_lora_a(tiny_models: Models, settings: Settings) -> None:
    """PEFT's own: uniform within 1/sqrt(in_features)."""
    state = lora_state(with_lora(tiny_models("5b"), settings(rank=64)))
    for name, tensor in state.items():
        if "lora_A" in name:
            bound = tensor.shape[1] ** -0.5
            assert 0.9 * bound < tensor.abs().max() <= bound


def test_target_modules_that_match_nothing_are_named(tiny_models: Models, settings: Settings) -> None:
    transformer = load_transformer(tiny_models("2b"), torch.float32)
    with pytest.raises(ConfigError, match=r"no layer of this model is named 'to_x', 'q'") as caught:
        add_lora(transformer, settings(target_modules=["to_q", "to_x", "q"]))
    assert "attn1.to_q" in caught.value.hint
    add_lora(transformer, settings(target_modules=["attn1.to_q", "ff.net.0.proj", "ff.net.2"]))
    assert len(trainable(transformer)) == 2 * 3 * 2


@pytest.mark.parametrize(
    ("family", "native", "choice", "expected"),
    [
        ("2b", "float16", "auto", torch.float16),
        ("2b", "bfloat16", "auto", torch.bfloat16),
        ("2b", "bfloat16", "float32", torch.float32),
        ("2b", "float32", "float16", torch.float16),
        ("5b", "float32", "auto", torch.float32),
        ("5b", "float16", "bfloat16", torch.bfloat16),
        ("5b", "float16", "auto", None),
        ("5b", "bfloat16", "float16", None),
        ("5b-i2v", "float32", "float16", None),
        ("1.5-5b", "bfloat16", "float16", None),
        ("1.5-5b-i2v", "float16", "float16", None),
    ],
)
def test_float16_is_for_2b_alone(
    tmp_path: Path, family: Family, native: str, choice: str, expected: torch.dtype | None
) -> None:
    root = build_tiny_model(tmp_path / "model", family, dtype=native)
    variant = read_variant(root)
    if expected is None:
        with pytest.raises(ConfigError, match="can exceed what float16 holds"):
            base_dtype(root, choice, variant)
    else:
        assert base_dtype(root, choice, variant) == expected


def test_a_lora_of_other_layers_is_not_loaded(tiny_models: Models, settings: Settings) -> None:
    small = with_lora(tiny_models("2b"), settings(rank=2))
    state = lora_state(small)
    load_lora_state(small, state)
    with pytest.raises(CheckpointError, match="other layers or another rank"):
        load_lora_state(with_lora(tiny_models("2b"), settings(rank=3)), state)


def test_damaged_weights_and_unknown_schedulers_are_refused(tiny_models: Models, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_models("2b"), tmp_path / "model")
    weights = next((root / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_transformer(root, torch.float32)
    config = root / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("CogVideoXDDIMScheduler", "DDPMScheduler"))
    with pytest.raises(ModelError, match="'DDPMScheduler'"):
        load_scheduler(root)
