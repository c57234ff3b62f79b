"""The LoRA file: what stock diffusers makes of it, what it remembers, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict

from cogcache.errors import LoraError, StorageError
from cogcache.lora import Provenance, read_lora_header, save_lora
from cogcache.tiny import FAMILIES, Family
from cogcache.variants import Variant, read_variant

Models = Callable[[Family], Path]
PIPELINES = {"t2v": CogVideoXPipeline, "i2v": CogVideoXImageToVideoPipeline}


def adapted(
    root: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[CogVideoXTransformer3DModel, LoraConfig]:
    """The transformer with a LoRA whose weights are far from zero, float32 as in training whatever the base is."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(root, subfolder="transformer", dtype=dtype)
    settings = {"r": 4, "lora_alpha": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], **options}
    config = LoraConfig(**settings)
    transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return transformer, config


def saved(path: Path, transformer: Any, config: LoraConfig, **provenance: Any) -> Path:
    tensors = get_peft_model_state_dict(transformer)
    return save_lora(path, tensors, lora_config=config.to_dict(), provenance=Provenance(**provenance))


def output(transformer: Any, variant: Variant) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (1, 2, variant.in_channels, variant.sample_height, variant.sample_width)
    hidden = torch.randn(shape, generator=generator)
    text = torch.randn((1, variant.text_length, variant.text_dim), generator=generator)
    tokens = 2 // (variant.patch_size_t or 1) * variant.sample_height * variant.sample_width // 4
    angles = torch.randn((tokens, variant.attention_head_dim), generator=generator)
    with torch.no_grad():
        result = transformer(
            hidden.to(transformer.patch_embed.proj.weight.dtype),
            text.to(transformer.patch_embed.proj.weight.dtype),
            torch.tensor([500]),
            ofs=torch.tensor([2.0]) if variant.ofs else None,
            image_rotary_emb=None if variant.positions == "sincos" else (angles.cos(), angles.sin()),
        )
    return result.sample


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_pipeline_applies_the_trained_alpha(
    tiny_models: Models, tmp_path: Path, family: Family
) -> None:
    """alpha 2 at rank 4. Fails when the adapter metadata is left out (diffusers then takes alpha = rank)."""
    root = tiny_models(family)
    variant = read_variant(root)
    trained, config = adapted(root)
    path = saved(
        tmp_path / "lora.safetensors", trained, config, base_model="tiny", variant=variant, frames=17
    )
    pipe = PIPELINES[variant.task].from_pretrained(root)
    base = output(pipe.transformer, variant)
    pipe.load_lora_weights(path)
    assert torch.equal(output(pipe.transformer, variant), output(trained, variant))
    assert not torch.allclose(output(trained, variant), base, atol=1e-2)


@pytest.mark.parametrize("family", ["2b", "5b"])
def test_a_bfloat16_base_rounds_the_lora(tiny_models: Models, tmp_path: Path, family: Family) -> None:
    """Training holds the LoRA in float32, the stock pipeline in the base's dtype: equal bits for a LoRA rounded to
    bfloat16, else equal within 1 % of the output and 15 % of what the LoRA changes in it (root mean squares): the
    size of bfloat16's rounding in the base.
    """
    root = tiny_models(family)
    variant = read_variant(root)
    trained, config = adapted(root, torch.bfloat16)
    path = saved(tmp_path / "lora.safetensors", trained, config)
    pipe = CogVideoXPipeline.from_pretrained(root, dtype=torch.bfloat16)
    base = output(pipe.transformer, variant).float()
    pipe.load_lora_weights(path)
    assert {p.dtype for n, p in pipe.transformer.named_parameters() if "lora_" in n} == {torch.bfloat16}
    stock, full = output(pipe.transformer, variant), output(trained, variant)
    assert not torch.equal(stock, full)
    error = (stock.float() - full.float()).norm()
    assert error < 0.01 * full.float().norm()
    assert error < 0.15 * (full.float() - base).norm()
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    assert torch.equal(stock, output(trained, variant))


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 8}},
        {"target_modules": r".*\.1\.attn1\.to_[qk]"},
        {"target_modules": ["to_q", "ff.net.0.proj", "ff.net.2"], "lora_dropout": 0.5},
    ],
)
def test_stock_pipeline_rebuilds_other_kinds_of_lora(
    tiny_models: Models, tmp_path: Path, options: Any
) -> None:
    root = tiny_models("2b")
    variant = read_variant(root)
    trained, config = adapted(root, **options)
    path = saved(tmp_path / "lora.safetensors", trained.eval(), config)
    pipe = CogVideoXPipeline.from_pretrained(root)
    pipe.load_lora_weights(path)
    assert torch.equal(output(pipe.transformer.eval(), variant), output(trained, variant))


def test_the_file_remembers_where_it_comes_from(tiny_models: Models, tmp_path: Path) -> None:
    root = tiny_models("2b")
    variant = read_variant(root)
    transformer, config = adapted(root)
    facts = {
        "base_model": str(root),
        "variant": variant,
        "fingerprint": "ab" * 32,
        "frames": 17,
        "size": "64x96",
    }
    header = read_lora_header(saved(tmp_path / "lora.safetensors", transformer, config, fps=12.5, **facts))
    assert (header.rank, header.alpha, header.fps) == (4, 2.0, 12.5)
    assert {name: getattr(header, name) for name in facts} == facts
    assert header.shapes["transformer_blocks.0.attn1.to_q.lora_A.weight"] == (4, 64)


def test_equal_input_gives_equal_bytes_with_aligned_data(tiny_models: Models, tmp_path: Path) -> None:
    """The safetensors library writes metadata in a random order; repeated because chance may hide that."""
    transformer, config = adapted(tiny_models("2b"))
    paths = [saved(tmp_path / f"{n}.safetensors", transformer, config, frames=17, fps=8.0) for n in range(8)]
    contents = {path.read_bytes() for path in paths}
    assert len(contents) == 1
    assert int.from_bytes(contents.pop()[:8], "little") % 8 == 0
    assert len(list(tmp_path.iterdir())) == len(paths)


def small_lora() -> dict[str, torch.Tensor]:
    return {
        "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(8, 64),
        "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(64, 8),
    }


def test_foreign_file_without_metadata(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(small_lora(), tmp_path / "foreign.safetensors")
    header = read_lora_header(tmp_path / "foreign.safetensors")
    assert (header.rank, header.alpha, header.base_model, header.variant) == (8, None, None, None)


def test_refuses_to_save_what_is_no_lora(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["to_q"]).to_dict()
    for tensors in ({}, {"proj.weight": torch.ones(2)}, {"a.lora_A.weight": torch.ones(0)}):
        with pytest.raises(LoraError):
            save_lora(tmp_path / "x.safetensors", tensors, lora_config=config, provenance=Provenance())
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tensors = {"a.lora_A.weight": torch.ones(1, 1)}
    config = LoraConfig(target_modules=["a"]).to_dict()
    with pytest.raises(StorageError, match="cannot be written"):
        save_lora(tmp_path / "file" / "x", tensors, lora_config=config, provenance=Provenance())


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def header_bytes(header: object, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


ENTRY = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
A = "transformer.x.lora_A.weight"

BAD_FILES = {
    "empty": b"",
    "pickle": pickle.dumps(Bomb()),
    "length beyond the file": header_bytes({A: ENTRY}, 1 << 62),
    "length of zero": header_bytes({A: ENTRY}, 0),
    "not JSON": header_bytes(b"{nonsense}"),
    "nested too deep": header_bytes(b"[" * 200_000),
    "not an object": header_bytes([1, 2]),
    "entry of a wrong kind": header_bytes({A: 3}) + b"1234",
    "negative shape": header_bytes({A: {**ENTRY, "shape": [-1, 1]}}) + b"1234",
    "cut short": header_bytes({A: {**ENTRY, "data_offsets": [0, 400]}}) + b"1234",
    "metadata not text": header_bytes({A: ENTRY, "__metadata__": {"cogcache": 1}}) + b"1234",
    "no LoRA inside": header_bytes({"transformer.x.weight": ENTRY}) + b"1234",
    "not for a transformer": header_bytes({"text_encoder.x.lora_A.weight": ENTRY}) + b"1234",
    "scalar LoRA": header_bytes({A: {**ENTRY, "shape": []}}) + b"1234",
    "damaged alpha": header_bytes(
        {
            A: ENTRY,
            "__metadata__": {"lora_adapter_metadata": '{"transformer.r":1,"transformer.lora_alpha":NaN}'},
        }
    )
    + b"1234",
    "damaged provenance": header_bytes({A: ENTRY, "__metadata__": {"cogcache": '{"frames":"many"}'}})
    + b"1234",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lora.safetensors"
    path.write_bytes(BAD_FILES[name])
    with pytest.raises(LoraError) as caught:
        read_lora_header(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="no LoRA file"):
        read_lora_header(tmp_path / "nowhere.safetensors")
