"""Which LoRA is trained: presets, patterns, kinds, and going on from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from cogcache.config import TrainConfig
from cogcache.config_io import load_config
from cogcache.errors import ConfigError, LoraError
from cogcache.lora import Provenance, read_lora_header, save_lora
from cogcache.lora.targets import RankPattern, name_targets, parse_rank_pattern
from cogcache.tiny import Family
from cogcache.train import train
from cogcache.train.adapter import continue_from
from cogcache.train.model import add_lora, load_transformer, lora_state
from cogcache.variants import read_variant

Models = Callable[[Family], Path]
Settings = Callable[..., TrainConfig]
Metrics = Callable[[Path], list[dict[str, Any]]]
ATTENTION = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"}


def added(root: Path, config: TrainConfig) -> Any:
    transformer = load_transformer(root, torch.float32)
    add_lora(transformer, config)
    return transformer


def layers(transformer: Any) -> set[str]:
    return {name.removesuffix(".lora_A.weight") for name in lora_state(transformer) if "lora_A" in name}


def endings(transformer: Any) -> set[str]:
    return {name.split(".", 2)[2] for name in layers(transformer)}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["attention"], ATTENTION),
        (["attention+ff"], ATTENTION | {"ff.net.0.proj", "ff.net.2"}),
        (["attention", "norm1.linear"], ATTENTION | {"norm1.linear"}),
        (["to_q", "ff.net.2"], {"attn1.to_q", "ff.net.2"}),
        ([r"re:.*\.attn1\.to_[qk]", "to_out.0"], {"attn1.to_q", "attn1.to_k", "attn1.to_out.0"}),
    ],
)
def test_targets(tiny_models: Models, settings: Settings, targets: list[str], expected: set[str]) -> None:
    transformer = added(tiny_models("5b"), settings(target_modules=targets))
    assert endings(transformer) == expected
    assert len(layers(transformer)) == 3 * len(expected)


def test_a_regular_expression_can_pick_blocks(tiny_models: Models, settings: Settings) -> None:
    transformer = added(tiny_models("5b"), settings(target_modules=[r"re:transformer_blocks\.[12]\..*to_v"]))
    assert layers(transformer) == {f"transformer_blocks.{n}.attn1.to_v" for n in (1, 2)}


def test_ranks_of_some_layers_keep_the_strength_unless_alpha_is_given(
    tiny_models: Models, settings: Settings
) -> None:
    patterns = ["to_q=6", r"transformer_blocks\.0\.attn1\.to_k=2:5"]
    attention = added(tiny_models("5b"), settings(rank=4, alpha=2.0, rank_pattern=patterns))
    first, second = (attention.transformer_blocks[n].attn1 for n in (0, 1))
    found = [
        (one.r["default"], one.scaling["default"])
        for one in (first.to_q, first.to_k, second.to_k, first.to_v)
    ]
    assert found == [(6, 0.5), (2, 2.5), (4, 0.5), (4, 0.5)]
    rs = added(tiny_models("5b"), settings(rank=4, alpha=2.0, rank_pattern=["to_q=16"], rslora=True))
    scales = [getattr(rs.transformer_blocks[0].attn1, name).scaling["default"] for name in ("to_q", "to_k")]
    assert scales == [1.0, 1.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_modules": ["re:("]},
        {"rank_pattern": ["to_q"]},
        {"rank_pattern": ["to_q=0"]},
        {"rank_pattern": ["to_(=4"]},
        {"rank_pattern": ["to_q=4:0"]},
    ],
)
def test_settings_that_cannot_be_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_config(TrainConfig, {"shards": "x", **wrong})


def test_what_matches_no_layer_is_named(tiny_models: Models, settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"no layer of this model is named 're:nothing\.\*'"):
        added(tiny_models("5b"), settings(target_modules=["attention", "re:nothing.*"]))
    with pytest.raises(ConfigError, match="'to_z=4' matches none"):
        added(tiny_models("5b"), settings(rank_pattern=["to_z=4"]))


def test_texts_and_back() -> None:
    for text in ("to_q=64", r"^transformer_blocks\.0\.attn1\.to_q=4:2.0", "a=b=3:1e-05"):
        assert str(parse_rank_pattern(text)) == text
    assert parse_rank_pattern("to_q=64:32") == RankPattern("to_q", 64, 32.0)
    full = [f"transformer_blocks.{n}.{end}" for n in range(2) for end in ("attn1.to_q", "ff.net.2")]
    assert name_targets(full, 2) == ["attn1.to_q", "ff.net.2"]
    assert name_targets(full, 3) == sorted(full)
    assert name_targets([*full, "proj_out"], 2) == sorted([*full, "proj_out"])


def strong(path: Path, factor: float = 20.0) -> Path:
    """Make lora_B of a short training large enough to matter."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {n: t * factor if "lora_B" in n else t for n, t in load_file(path).items()}
    save_file(tensors, path, metadata=metadata)
    return path


def fused_model(root: Path, lora: Path, folder: Path) -> Path:
    """A copy of the model with the LoRA merged into its weights by the stock pipeline."""
    for part in root.iterdir():
        if part.name != "transformer":
            folder.mkdir(exist_ok=True)
            (folder / part.name).symlink_to(part)
    transformer = CogVideoXTransformer3DModel.from_pretrained(root, subfolder="transformer")
    pipe = CogVideoXPipeline.from_pretrained(root, transformer=transformer, vae=None, text_encoder=None)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        {"rank": 4, "alpha": 2.0},
        {"rank": 4, "alpha": 2.0, "rank_pattern": ["to_q=2:3"], "target_modules": ["attention+ff"], "rslora": True},
        {"rank": 4, "alpha": 2.0, "dora": True},
    ],
    ids=["plain", "mixed rslora", "dora"],
)  # fmt: skip
def test_a_run_from_a_lora_begins_with_its_loss(
    tiny_models: Models, settings: Settings, metrics: Metrics, tmp_path: Path, kind: dict[str, Any]
) -> None:
    """The loss of the first step is that of the base with the LoRA merged in by stock diffusers, same draws."""
    first = train(settings(output=tmp_path / "first", **kind))
    lora = strong(first.weights)
    # rank and the rest come from the file: `settings` must not give them
    given = settings(output=tmp_path / "on", steps=1, seed=7).model_dump(
        exclude={"rank", "alpha"}, exclude_unset=True
    )
    on = train(TrainConfig(**given, init_lora=lora))
    fused = fused_model(tiny_models("5b"), lora, tmp_path / "fused")
    train(settings(output=tmp_path / "merged", steps=1, seed=7, model=str(fused)))
    train(settings(output=tmp_path / "fresh", steps=1, seed=7))
    loss = {name: metrics(tmp_path / name)[0]["loss"] for name in ("on", "merged", "fresh")}
    assert loss["on"] == pytest.approx(loss["merged"], rel=1e-5)
    assert loss["on"] != pytest.approx(loss["fresh"], rel=1e-3)
    before, after = read_lora_header(lora), read_lora_header(on.weights)
    assert (before.rank, before.alpha, before.shapes) == (after.rank, after.alpha, after.shapes)
    saved = load_config(TrainConfig, {}, tmp_path / "on" / "config.yaml")
    assert (saved.rank, saved.alpha, saved.dora, saved.rslora) == (
        4, 2.0, kind.get("dora", False), kind.get("rslora", False),
    )  # fmt: skip


def test_a_run_from_a_lora_resumes_exactly(settings: Settings, tmp_path: Path) -> None:
    lora = strong(train(settings(output=tmp_path / "first")).weights)

    def go(name: str, **changes: Any) -> bytes:
        config = settings(output=tmp_path / name, init_lora=lora, checkpoint_every=2, **changes)
        return train(config).weights.read_bytes()

    whole = go("whole", steps=4)
    go("parts", steps=2)
    assert go("parts", steps=4, resume="latest") == whole
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(lora.read_bytes())
    config = settings(
        output=tmp_path / "parts", init_lora=moved, checkpoint_every=2, steps=5, resume="latest"
    )
    train(config)  # the same file under another name


def reference_file(path: Path, root: Path) -> Path:
    """A LoRA of rank 4 for to_q and to_v, without its alpha, as the reference trainer writes it."""
    variant = read_variant(root)
    width = variant.num_attention_heads * variant.attention_head_dim
    tensors = {
        f"transformer.transformer_blocks.{n}.attn1.{layer}.lora_{part}.weight": torch.ones(shape)
        for n in range(variant.num_layers)
        for layer in ("to_q", "to_v")
        for part, shape in (("A", (4, width)), ("B", (width, 4)))
    }
    save_file(tensors, path)
    return path


def test_a_file_that_does_not_say_its_alpha(
    tiny_models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny_models("5b")
    lora, variant = reference_file(tmp_path / "reference.safetensors", root), read_variant(root)

    def filled(**given: Any) -> TrainConfig:
        return continue_from(TrainConfig(shards=tmp_path, init_lora=lora, **given), variant, root, "model")

    assumed = filled()
    assert (assumed.rank, assumed.alpha) == (4, 4.0)
    assert assumed.target_modules == ["attn1.to_q", "attn1.to_v"]
    assert "give it as --alpha" in caplog.text
    caplog.clear()
    assert filled(alpha=2).alpha == 2.0
    assert not caplog.text
    transformer = added(root, filled(alpha=2))
    assert transformer.transformer_blocks[0].attn1.to_q.scaling["default"] == 0.5
    state = lora_state(transformer)
    assert all(value.dtype == torch.float32 and bool((value == 1).all()) for value in state.values())


def test_settings_that_contradict_the_file(tiny_models: Models, tmp_path: Path) -> None:
    root = tiny_models("5b")
    lora, variant = reference_file(tmp_path / "reference.safetensors", root), read_variant(root)

    def filled(**given: Any) -> TrainConfig:
        return continue_from(TrainConfig(shards=tmp_path, init_lora=lora, **given), variant, root, "model")

    assert filled(rank=4, dora=False).rank == 4
    with pytest.raises(ConfigError, match="has rank 4, and --rank says 8"):
        filled(rank=8)
    with pytest.raises(ConfigError, match="has dora False, and --dora says True"):
        filled(dora=True)
    with pytest.raises(LoraError, match=r"layers and ranks.*--target-modules"):
        added(root, filled(target_modules=["attention"]))


def test_a_lora_of_another_family_is_refused(tiny_models: Models, tmp_path: Path) -> None:
    root, other = tiny_models("5b"), read_variant(tiny_models("1.5-5b"))
    bare = load_file(reference_file(tmp_path / "x.safetensors", root))
    tensors = {name.removeprefix("transformer."): value for name, value in bare.items()}
    known = {"r": 4, "lora_alpha": 2, "target_modules": ["to_q", "to_v"]}
    lora = save_lora(
        tmp_path / "lora.safetensors", tensors, lora_config=known, provenance=Provenance(variant=other)
    )
    config = TrainConfig(shards=tmp_path, init_lora=lora)
    with pytest.raises(LoraError, match="patch_size_t 2 is not None"):
        continue_from(config, read_variant(root), root, "model")


@pytest.mark.parametrize("kind", [{"dora": True}, {"rslora": True}])
def test_dora_and_rslora_train_in_bfloat16_and_load_in_the_stock_pipeline(
    tiny_models: Models, settings: Settings, tmp_path: Path, kind: dict[str, Any]
) -> None:
    """The strength is what was trained; the magnitudes of DoRA move and are stored."""
    root = tiny_models("5b")
    lora = train(settings(output=tmp_path / "run", dtype="bfloat16", **kind)).weights
    pipe = CogVideoXPipeline.from_pretrained(root, vae=None, text_encoder=None)
    pipe.load_lora_weights(lora)
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    assert layer.scaling == {"default_0": 1 / 2 if "dora" in kind else 1 / 2**0.5}
    stored = load_file(lora)
    magnitude = [name for name in stored if name.endswith("lora_magnitude_vector")]
    assert bool(magnitude) == kind.get("dora", False)
    if magnitude:
        weight = pipe.transformer.transformer_blocks[0].attn1.to_q.base_layer.weight
        moved = stored["transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector"]
        start = weight.bfloat16().float().norm(dim=1)
        assert torch.allclose(moved, start, rtol=0.2)
        assert not torch.equal(moved, start)
