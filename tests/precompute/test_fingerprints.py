"""What determines the bytes of a cache is in its fingerprints, and changes show in the one that they concern.

Mutations tried, each caught: no text config; tokenizer files not hashed; no schema; samples without the hash of
their source.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cogcache.cache.format import SCHEMA, differences
from cogcache.cache.reader import CacheReader
from cogcache.config import EncodeConfig
from cogcache.precompute import encode_all
from cogcache.precompute.settings import decide
from cogcache.tiny import Family

VAE = {"schema", "vae_weights", "vae_config", "vae_dtype", "vae_tiling", "vae_frame_batch"}
FIELDS = {
    "latents": VAE | {"log_variance", "fps", "window", "short", "fit", "interpolation", "reader"},
    "images": VAE | {"fit", "interpolation", "sigma_log_mean", "sigma_log_std"},
    "text": {"schema", "text_weights", "text_config", "text_tokenizer", "text_dtype", "text_length"},
}
IN_VAE = {("latents", "vae_weights"), ("images", "vae_weights")}


@pytest.fixture
def model(tiny_models: Callable[[Family], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models("1.5-5b-i2v"), tmp_path / "model"))


def other_json(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "a_new_setting": 1}))


def other_weights(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path)


def note(path: Path) -> None:
    told = {"_diffusers_version": "9", "transformers_version": "9"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}))


@pytest.mark.parametrize(
    ("name", "change", "changed"),
    [
        ("vae/*.safetensors", other_weights, IN_VAE),
        ("vae/config.json", other_json, {("latents", "vae_config"), ("images", "vae_config")}),
        ("text_encoder/*.safetensors", other_weights, {("text", "text_weights")}),
        ("text_encoder/config.json", other_json, {("text", "text_config")}),
        ("tokenizer/tokenizer_config.json", other_json, {("text", "text_tokenizer")}),
        ("transformer/*.safetensors", other_weights, set()),
        ("vae/config.json", note, set()),
        ("text_encoder/config.json", note, set()),
    ],
)
def test_each_part_of_the_model_is_told(
    settings: Callable[..., EncodeConfig],
    model: Path,
    name: str,
    change: Callable[[Path], None],
    changed: set[tuple[str, str]],
) -> None:
    config = settings(model=str(model))
    before = decide(config).identity().series
    assert {series: fields.keys() for series, fields in before.items()} == FIELDS
    assert {fields["schema"] for fields in before.values()} == {SCHEMA}
    change(next(model.glob(name)))
    after = decide(config).identity().series
    found = {(series, field) for series in before for field in differences(before[series], after[series])}
    assert found == changed


def test_each_sample_carries_the_hash_of_its_source(
    settings: Callable[..., EncodeConfig], clips_root: Path, tmp_path: Path
) -> None:
    encode_all(settings(size="16x32"))
    reader = CacheReader(tmp_path / "shards")
    for row in reader.samples:
        assert row.sha256 == hashlib.sha256((clips_root / row.source).read_bytes()).hexdigest()
        facts = reader.facts("latents", row.latents)
        assert (facts["sha256"], facts["bucket"]) == (row.sha256, "9x16x32")
