"""Prompts for validation beside the shards.

Mutations tried, each caught: the noised first draw instead of the clean image; prompts sorted; the table dropped by a
run without the flag; an empty table written where there are no prompts; image read at line N+1.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogcache.cache.format import VALIDATION_FILE
from cogcache.cache.reader import CacheReader
from cogcache.config import EncodeConfig
from cogcache.errors import ConfigError, DamagedCacheError, DatasetError
from cogcache.precompute.encode import encode_all
from cogcache.precompute.text import FrozenText
from cogcache.tiny import Family

Settings = Callable[..., EncodeConfig]
PROMPTS = ["A rabbit in the snow", "A bird sings, the leaves move.", "A bear"]


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """A folder with ``prompts.txt``, ``images.txt`` and two pictures; the first is listed twice."""
    folder = tmp_path / "lists"
    (folder / "pictures").mkdir(parents=True)
    for number in (0, 1):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "images.txt").write_text("pictures/1.png\npictures/0.png\npictures/1.png\n")
    return folder


@pytest.fixture
def few(clips_root: Path, tmp_path: Path) -> Path:
    """A data root of two clips."""
    root = tmp_path / "few"
    root.mkdir()
    for number in (0, 1):
        for suffix in ("mp4", "txt"):
            shutil.copy(clips_root / f"{number}.{suffix}", root)
    return root


def image_settings(settings: Settings, few: Path, lists: Path, **changes: Any) -> EncodeConfig:
    return settings(
        "1.5-5b-i2v",
        data_root=few,
        image_draws=2,
        validation_prompts=lists / "prompts.txt",
        validation_images=lists / "images.txt",
        **changes,
    )


def shard_files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.glob("*/*")) if p.is_file()}


def test_prompts_join_a_finished_cache_and_nothing_else_changes(
    settings: Settings, few: Path, lists: Path
) -> None:
    plain = settings(data_root=few)
    encode_all(plain)
    root = plain.shards
    assert root is not None
    assert not (root / VALIDATION_FILE).exists()
    assert CacheReader(root).validation == []
    assert sorted(json.loads((root / "manifest.json").read_bytes())["tables"]) == [
        "failures.jsonl",
        "samples.jsonl",
    ]
    before = shard_files(root)
    samples = (root / "samples.jsonl").read_bytes()

    result = encode_all(settings(data_root=few, validation_prompts=lists / "prompts.txt"))
    assert (result.encoded, result.captions) == (0, 2)  # the bird is the caption of a clip already
    after = shard_files(root)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"text"}
    assert (root / "samples.jsonl").read_bytes() == samples
    reader = CacheReader(root)
    assert [row.prompt for row in reader.validation] == PROMPTS
    assert {(row.image, row.image_name) for row in reader.validation} == {(None, None)}
    assert reader.validation[1].text in {sample.text for sample in reader.samples}

    manifest = (root / "manifest.json").read_bytes()
    again = encode_all(plain)
    assert again.captions == 0
    assert (root / "manifest.json").read_bytes() == manifest
    (lists / "prompts.txt").write_text("A wolf\n")
    encode_all(settings(data_root=few, validation_prompts=lists / "prompts.txt"))
    assert [row.prompt for row in CacheReader(root).validation] == ["A wolf"]


def test_embeddings_and_images_are_those_of_inference(
    settings: Settings, few: Path, lists: Path, tiny_models: Callable[[Family], Path]
) -> None:
    from diffusers import AutoencoderKLCogVideoX

    config = image_settings(settings, few, lists)
    encode_all(config)
    reader = CacheReader(config.shards)
    names = [row.image_name for row in reader.validation]
    assert names == ["pictures/1.png", "pictures/0.png", "pictures/1.png"]
    assert reader.validation[0].image == reader.validation[2].image
    model = tiny_models("1.5-5b-i2v")
    vae = AutoencoderKLCogVideoX.from_pretrained(model, subfolder="vae")
    text = FrozenText(model, "float32", reader.manifest.model.variant.text_length, torch.device("cpu"))
    for row in reader.validation:
        embeds = reader.read("text", row.text).tensors["prompt_embeds"]
        torch.testing.assert_close(embeds, text.encode([row.prompt])[0], rtol=1e-4, atol=1e-5)
        entry = reader.read("images", row.image)
        assert (entry.facts["draw"], entry.facts["sigma"]) == (None, 0.0)
        picture = Image.open(lists / str(row.image_name)).resize((48, 32), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels[None, :, None]).latent_dist
        distance = (entry.tensors["latents"] - posterior.mean[0]) / posterior.std[0]
        assert distance.square().mean() == pytest.approx(1, abs=0.35)  # a sample of this very posterior


def test_a_bank_and_its_validation_images_can_be_remade(settings: Settings, few: Path, lists: Path) -> None:
    config = image_settings(settings, few, lists)
    encode_all(config)
    assert config.shards
    before = shard_files(config.shards)
    without = {"validation_prompts": None, "validation_images": None}
    with pytest.raises(ConfigError, match="remake-images also drops") as caught:
        encode_all(config.model_copy(update={**without, "remake_images": True}))
    assert "again" in caught.value.hint
    assert len(CacheReader(config.shards).validation) == 3
    encode_all(config.model_copy(update={"remake_images": True}))
    assert shard_files(config.shards) == before
    assert len(CacheReader(config.shards).validation) == 3


def test_damage_is_noticed_and_lost_images_are_told(
    settings: Settings, few: Path, lists: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = image_settings(settings, few, lists)
    encode_all(config)
    root = config.shards
    assert root
    plain = config.model_copy(update={"validation_prompts": None, "validation_images": None})
    for file in (root / "images").glob("images-*"):
        file.unlink()
    result = encode_all(plain)  # makes the bank anew; whose picture a prompt had is not known to it
    assert {(f.source, f.window) for f in result.failures} == {
        (f"pictures/{n}.png", "validation") for n in (0, 1)
    }
    assert all("give --validation-prompts" in failure.reason for failure in result.failures)
    assert CacheReader(root).validation == []
    assert encode_all(config).failures == []
    assert len(CacheReader(root).validation) == 3

    table = root / VALIDATION_FILE
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(DamagedCacheError, match=r"validation\.jsonl is missing or not"):
        CacheReader(root)
    capsys.readouterr()
    encode_all(plain)
    assert "validation prompts of this cache are lost" in capsys.readouterr().err
    assert CacheReader(root).validation == []


@pytest.mark.parametrize(
    ("family", "prompts", "images", "words"),
    [
        ("5b", "one\n\nthree\n", None, ["prompts.txt line 2: blank line"]),
        ("5b", "", None, ["prompts.txt is empty"]),
        ("5b", None, None, ["prompts.txt is missing"]),
        ("1.5-5b-i2v", "one\ntwo\n", "pictures/0.png\n", ["prompts.txt has 2 lines, images.txt 1"]),
        (
            "1.5-5b-i2v",
            "one\ntwo\n",
            "pictures/0.png\npictures/9.png\n",
            ["line 2: pictures/9.png does not exist"],
        ),
        ("1.5-5b-i2v", "one\n", "../few/0.mp4\n", ["line 1: ../few/0.mp4 leaves the folder of the list"]),
        (
            "1.5-5b-i2v",
            "one\n\nthree\n",
            "prompts.txt\npictures/9.png\n\n",
            ["mistakes", "line 1: prompts.txt: the image cannot be read", "images.txt line 3"],
        ),
    ],
)
def test_mistakes_are_told_at_once_before_any_model_is_loaded(
    settings: Settings,
    few: Path,
    lists: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: Family,
    prompts: str | None,
    images: str | None,
    words: list[str],
) -> None:
    monkeypatch.setattr(FrozenText, "__init__", lambda *_: pytest.fail("loaded a model"))
    (lists / "prompts.txt").unlink()
    if prompts is not None:
        (lists / "prompts.txt").write_text(prompts)
    if images is not None:
        (lists / "images.txt").write_text(images)
    more = {"validation_images": lists / "images.txt"} if images is not None else {}
    config = settings(family, data_root=few, validation_prompts=lists / "prompts.txt", **more)
    with pytest.raises(DatasetError) as caught:
        encode_all(config)
    for word in words:
        assert word in str(caught.value)
    assert config.shards
    assert not config.shards.exists()


def test_flags_that_do_not_fit_are_refused(settings: Settings, few: Path, lists: Path) -> None:
    prompts, images = lists / "prompts.txt", lists / "images.txt"
    with pytest.raises(ConfigError, match="validation prompts need --validation-images"):
        encode_all(settings("1.5-5b-i2v", data_root=few, validation_prompts=prompts))
    with pytest.raises(ConfigError, match="this one takes none"):
        encode_all(settings(data_root=few, validation_prompts=prompts, validation_images=images))
    with pytest.raises(ConfigError, match="needs --validation-prompts"):
        encode_all(settings(data_root=few, validation_images=images))
