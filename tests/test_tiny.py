"""The embedded model: complete, deterministic, with each family's real facts, and alive in every layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from transformers import AutoTokenizer, T5EncoderModel, T5Tokenizer

from cogcache.errors import ConfigError, StorageError
from cogcache.tiny import FAMILIES, Family, build_tiny_model
from cogcache.variants import read_variant, weights_dtype

Models = Callable[[Family], Path]

# scaling_factor, invert_scale_latents, snr_shift_scale, in_channels, patch_size_t, positions, ofs, text length
FACTS = {
    "2b": (1.15258426, False, 3.0, 16, None, "sincos", False, 226),
    "5b": (0.7, False, 1.0, 16, None, "rope", False, 226),
    "5b-i2v": (0.7, False, 1.0, 32, None, "rope+learned", False, 226),
    "1.5-5b": (0.7, True, 1.0, 16, 2, "rope", False, 224),
    "1.5-5b-i2v": (0.7, True, 1.0, 32, 2, "rope", True, 224),
}


def clip() -> torch.Tensor:
    """[1, 3, 17, 64, 96] in -1..1: smooth shapes that move."""
    grid = [torch.linspace(-1, 1, n) for n in (17, 64, 96)]
    t, y, x = torch.meshgrid(*grid, indexing="ij")
    return torch.stack([torch.sin(4 * x + t), torch.cos(5 * y - t), torch.sin(9 * x * y + t)])[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_real_facts(tiny_models: Models, family: Family) -> None:
    variant = read_variant(tiny_models(family))
    assert FACTS[family] == (
        variant.scaling_factor,
        variant.invert_scale_latents,
        variant.snr_shift_scale,
        variant.in_channels,
        variant.patch_size_t,
        variant.positions,
        variant.ofs,
        variant.text_length,
    )
    assert (variant.latent_channels, variant.spatial_factor, variant.temporal_factor) == (16, 8, 4)
    variant.check_clip(variant.sample_frames, variant.default_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_schedule_is_the_published_one(tiny_models: Models, family: Family) -> None:
    """Values of abar worked out here from the published betas, the SNR shift and the zero-SNR rescaling."""
    scheduler = CogVideoXDDIMScheduler.from_pretrained(tiny_models(family), subfolder="scheduler")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    shift = FACTS[family][2]
    root = (abar / (shift + (1 - shift) * abar)).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    assert torch.allclose(scheduler.alphas_cumprod.double(), expected)
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == 999  # trailing spacing


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_pipeline_generates(tiny_models: Models, family: Family) -> None:
    """Through the class that the model itself names, with the pipeline's own defaults for the size."""
    pipe = DiffusionPipeline.from_pretrained(tiny_models(family))
    is_image = family.endswith("i2v")
    assert type(pipe) is (CogVideoXImageToVideoPipeline if is_image else CogVideoXPipeline)
    first = {"image": torch.rand(1, 3, 64, 96)} if is_image else {}
    frames = pipe(prompt="A rabbit", num_inference_steps=2, num_frames=17, output_type="pt", **first).frames
    assert frames.shape == (1, 17, 3, 64, 96)
    assert frames.isfinite().all()
    assert frames.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_and_pixels_have_a_useful_spread(tiny_models: Models, family: Family) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_models(family), subfolder="vae")
    with torch.no_grad():
        posterior = vae.encode(clip()).latent_dist
        pixels = vae.decode(posterior.mean).sample
        vae.enable_tiling()
        tiled = vae.encode(clip()).latent_dist.mean
    assert posterior.mean.shape == tiled.shape == (1, 16, 5, 8, 12)
    assert 0.5 < posterior.mean.std() < 2
    assert posterior.std.max() < 0.2
    assert pixels.shape == clip().shape
    assert 0.2 < pixels.std() < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_transformer_gets_a_gradient(tiny_models: Models, family: Family) -> None:
    variant = read_variant(tiny_models(family))
    model = CogVideoXTransformer3DModel.from_pretrained(tiny_models(family), subfolder="transformer")
    angles = torch.randn(2 // (variant.patch_size_t or 1) * 24, variant.attention_head_dim)
    output = model(
        torch.randn(1, 2, variant.in_channels, 8, 12),
        torch.randn(1, variant.text_length, variant.text_dim),
        torch.tensor([500]),
        ofs=torch.tensor([2.0]) if variant.ofs else None,
        image_rotary_emb=None if variant.positions == "sincos" else (angles.cos(), angles.sin()),
    ).sample
    assert 0.3 < output.std() < 3
    output.square().mean().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-7]
    # Without rotary positions a bias on all keys alike shifts the softmax's input, which changes nothing.
    assert [name for name in still if not name.endswith("norm_k.bias")] == []


def test_tokenizer_is_a_working_t5_tokenizer(tiny_models: Models) -> None:
    """Ids are those of SentencePiece itself, however the tokenizer is loaded."""
    folder = tiny_models("2b") / "tokenizer"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    text = "A tall BIRD (grey-blue) waits; 3 rabbits jump, & the sun sets!"
    for kind in (AutoTokenizer, T5Tokenizer):
        tokenizer = kind.from_pretrained(folder)
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
        ids = tokenizer(text).input_ids
        assert ids == [*pieces.encode(text), 1]
        assert 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        padded = tokenizer("", padding="max_length", max_length=226).input_ids
        assert padded == [1, *[0] * 225]
    assert len(tokenizer) == T5EncoderModel.from_pretrained(folder.parent / "text_encoder").config.vocab_size


def test_captions_make_a_difference(tiny_models: Models) -> None:
    pipe = CogVideoXPipeline.from_pretrained(tiny_models("5b"), vae=None, transformer=None)
    with torch.no_grad():
        one, other = (
            pipe.encode_prompt(text, do_classifier_free_guidance=False)[0] for text in ("A cat", "A dog")
        )
    assert (one - other).std() > 0.05


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_bytes_and_no_trace_in_global_state(tiny_models: Models, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    again = files(build_tiny_model(tmp_path / "again", "1.5-5b-i2v"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again == files(tiny_models("1.5-5b-i2v"))
    assert sum(map(len, again.values())) < 8e6
    other = files(build_tiny_model(tmp_path / "other", "1.5-5b-i2v", seed=1))
    assert {name for name in again if again[name] != other[name]} == {
        name for name in again if name.endswith(".safetensors")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_weights_are_stored_in_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    root = build_tiny_model(tmp_path / "model", "5b", dtype=dtype)
    assert {weights_dtype(root / name) for name in ("vae", "text_encoder", "transformer")} == {dtype}


def test_an_empty_folder_is_used_and_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    root = build_tiny_model(tmp_path / "empty", "2b")
    shutil.rmtree(root / "vae")
    with pytest.raises(StorageError, match="not an empty folder"):
        build_tiny_model(root, "2b")
    assert not (root / "vae").exists()


def test_wrong_family_dtype_or_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="2b, 5b"):
        build_tiny_model(tmp_path / "x", "7b")
    with pytest.raises(ConfigError):
        build_tiny_model(tmp_path / "x", "2b", dtype="int8")
    with pytest.raises(StorageError, match="cannot be written"):
        build_tiny_model(tmp_path / "file" / "x", "2b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
