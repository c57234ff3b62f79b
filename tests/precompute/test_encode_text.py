"""Embeddings that are of no use fail the captions they belong to, and nothing else."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cogcache.cache.reader import CacheReader
from cogcache.config import EncodeConfig
from cogcache.errors import ModelError
from cogcache.precompute import encode_all
from cogcache.precompute.datasets import find_clips
from cogcache.tiny import Family

Settings = Callable[..., EncodeConfig]


def poisoned(model: Path, token: int) -> None:
    """Make one token's embedding not a number."""
    weights = model / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["shared.weight"][token] = torch.nan
    save_file(tensors, weights, {"format": "pt"})


@pytest.fixture
def model(tiny_models: Callable[[Family], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_models("5b"), tmp_path / "model")


def test_an_embedding_that_is_not_finite_fails_its_clips_alone(settings: Settings, model: Path) -> None:
    config = settings(model=str(model))
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    clips = find_clips(config.data_root, "auto", False)
    tokens = {clip.source: set(tokenizer(clip.caption).input_ids) for clip in clips}
    uses = Counter(token for found in tokens.values() for token in found)
    source, token = next((s, t) for s, found in tokens.items() for t in sorted(found) if uses[t] == 1)
    poisoned(model, token)

    result = encode_all(config)
    assert [(failure.source, "not finite" in failure.reason) for failure in result.failures] == [
        (source, True)
    ]
    reader = CacheReader(result.shards)
    assert {sample.source for sample in reader.samples} == tokens.keys() - {source}
    assert result.encoded == 8  # the latent of the clip is good and stays


def test_an_encoder_that_fails_on_the_empty_caption_stops_the_run(settings: Settings, model: Path) -> None:
    poisoned(model, 0)  # padding
    with pytest.raises(ModelError, match="not finite"):
        encode_all(settings(model=str(model)))
