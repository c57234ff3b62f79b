"""What is in the shards is what the stock diffusers pipeline computes, and training on it is the same."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from cogcache.cache.format import IMAGES, LATENTS, TEXT, SampleRecord
from cogcache.cache.reader import CacheReader
from cogcache.config import EncodeConfig, TrainConfig
from cogcache.draws import generator, uniform
from cogcache.geometry import parse_size
from cogcache.models import torch_dtype
from cogcache.precompute import encode_all
from cogcache.tiny import Family
from cogcache.train.data import Micro, Samples
from cogcache.train.model import add_lora
from cogcache.train.objective import loss_per_sample, padded_frames
from cogcache.variants import Variant, read_variant
from cogcache.video import ClipRequest, load_clip

FAMILIES: tuple[Family, ...] = ("2b", "5b", "1.5-5b")


def stock_pipeline(model: str | Path, dtype: str = "float32", kind: Any = CogVideoXPipeline) -> Any:
    pipeline = kind.from_pretrained(model, dtype=torch_dtype(dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_pictures(config: EncodeConfig, sample: SampleRecord) -> list[Image.Image]:
    """Frames of a clip as pictures."""
    assert config.size is not None
    request = ClipRequest(frames=sample.frames, size=parse_size(config.size), fps=None)
    frames = load_clip(config.data_root / sample.source, request).frames
    return [Image.fromarray(frame.numpy()) for frame in frames]


@torch.no_grad()
def stock_moments(pipeline: Any, config: EncodeConfig, sample: SampleRecord) -> torch.Tensor:
    """Moments [2C, F', H', W'] of a clip: VideoProcessor and VAE as diffusers' own, frames as pictures."""
    pictures = clip_pictures(config, sample)
    video = pipeline.video_processor.preprocess_video(pictures, height=sample.height, width=sample.width)
    moments: torch.Tensor = pipeline.vae.encode(video.to(pipeline.vae.dtype)).latent_dist.parameters[0]
    return moments


@torch.no_grad()
def stock_embedding(pipeline: Any, caption: str) -> torch.Tensor:
    """Embedding [L, D] of one caption on its own."""
    length = pipeline.transformer.config.max_text_seq_length
    embeds, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=length)
    embedding: torch.Tensor = embeds[0]
    return embedding


@torch.no_grad()
def stock_image_latents(pipeline: Any, config: EncodeConfig, sample: SampleRecord, seed: int) -> torch.Tensor:
    """Latents [1, C, 1, H', W'] of the first frame, noised as in the reference trainer, all drawn from ``seed``."""
    first = clip_pictures(config, sample)[0]
    pixels = pipeline.video_processor.preprocess(first, height=sample.height, width=sample.width).unsqueeze(2)
    random = torch.Generator().manual_seed(seed)
    sigma = math.exp(-3.0 + 0.5 * torch.randn((), generator=random).item())
    pixels = pixels + sigma * torch.randn(pixels.shape, generator=random)
    latents: torch.Tensor = pipeline.vae.encode(pixels).latent_dist.sample(random)
    return latents


def add_random_lora(transformer: torch.nn.Module, config: TrainConfig) -> None:
    """A LoRA in the frozen transformer that is not zero; lora_A would get no gradient."""
    add_lora(transformer.requires_grad_(False), config)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator(name))


def loss_and_gradients(
    transformer: torch.nn.Module,
    scheduler: Any,
    moments: torch.Tensor,
    embedding: torch.Tensor,
    variant: Variant,
    purpose: str,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    channels, frames, height, width = moments.shape[0] // 2, *moments.shape[1:]
    padded = padded_frames(frames, variant.patch_size_t)
    noise = torch.randn(1, padded, channels, height, width, generator=generator(purpose, "noise"))
    posterior = torch.randn(1, channels, frames, height, width, generator=generator(purpose, "posterior"))
    return backward(
        transformer,
        scheduler,
        moments.unsqueeze(0),
        embedding.unsqueeze(0),
        noise_bpchw=noise,
        posterior_noise_bcfhw=posterior,
        timesteps_b=torch.tensor([generator(purpose).initial_seed() % 1000]),
        variant=variant,
    )


def backward(
    transformer: torch.nn.Module, *inputs: Any, **draws: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradients of all that is trained, for arguments of ``loss_per_sample``."""
    transformer.zero_grad()
    loss = loss_per_sample(transformer, *inputs, **draws)
    loss.sum().backward()
    gradients = {n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_equal_in_every_bit(cached: Any, fresh: Any, variant: Variant) -> None:
    assert torch.equal(cached[0], fresh[0])
    assert cached[0].item() > 0
    assert cached[1].keys() == fresh[1].keys()
    assert len(cached[1]) == 2 * 4 * variant.num_layers
    for name, gradient in cached[1].items():
        assert torch.equal(gradient, fresh[1][name]), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_training_from_shards_equals_training_on_the_fly(
    settings: Callable[..., EncodeConfig], family: Family
) -> None:
    """The central promise. One caption a batch, as on the fly; then loss and gradients agree in every bit."""
    config = settings(family, text_batch_size=1)
    encode_all(config)
    reader, variant, pipeline = CacheReader(config.shards), read_variant(Path(config.model)), None
    pipeline = stock_pipeline(config.model)
    transformer = pipeline.transformer
    add_random_lora(transformer, TrainConfig(shards=config.shards, rank=4, alpha=2.0))
    for sample in reader.samples[:3]:
        cached = loss_and_gradients(
            transformer,
            pipeline.scheduler,
            reader.read(LATENTS, sample.latents).tensors["moments"],
            reader.read(TEXT, sample.text).tensors["prompt_embeds"],
            variant,
            sample.id,
        )
        fresh = loss_and_gradients(
            transformer,
            pipeline.scheduler,
            stock_moments(pipeline, config, sample),
            stock_embedding(pipeline, sample.caption),
            variant,
            sample.id,
        )
        assert_equal_in_every_bit(cached, fresh, variant)


@pytest.mark.parametrize("family", ["5b-i2v", "1.5-5b-i2v"])
def test_image_to_video_from_shards_equals_training_on_the_fly(
    settings: Callable[..., EncodeConfig], family: Family
) -> None:
    """The same for image-to-video, as training reads its batches: draws of two epochs are made anew from their names,
    the picture's noise from the seed that the bank records.
    """
    config = settings(family, frames=17, size="64x96", text_batch_size=1, image_draws=3)
    encode_all(config)
    reader, variant = CacheReader(config.shards), read_variant(Path(config.model))
    pipeline = stock_pipeline(config.model, kind=CogVideoXImageToVideoPipeline)
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    training = TrainConfig(
        shards=config.shards, rank=4, alpha=2.0, seed=7, caption_dropout=0, image_dropout=0
    )
    add_random_lora(transformer, training)
    samples, used = Samples(reader, variant, training), set()
    for index, epoch in ((0, 0), (1, 0), (0, 1)):
        sample = samples.records[index]
        batch = samples.batch(Micro(epoch, (index,), 1))
        cached = backward(
            transformer,
            scheduler,
            batch.moments_bcfhw,
            batch.prompt_embeds_bld,
            noise_bpchw=batch.noise_bpchw,
            posterior_noise_bcfhw=batch.posterior_noise_bcfhw,
            timesteps_b=batch.timesteps_b,
            image_latents_bcfhw=batch.image_latents_bcfhw,
            variant=variant,
        )
        names = (training.seed, epoch, sample.id)
        key = sample.images[int(3 * uniform(*names, "image"))]
        used.add(key)
        moments = stock_moments(pipeline, config, sample).unsqueeze(0)
        shape = (1, 16, *moments.shape[2:])
        padded = padded_frames(shape[2], variant.patch_size_t)
        seed = reader.read(IMAGES, key).facts["seed"]
        fresh = backward(
            transformer,
            scheduler,
            moments,
            stock_embedding(pipeline, sample.caption).unsqueeze(0),
            noise_bpchw=torch.randn((1, padded, 16, *shape[3:]), generator=generator(*names, "noise")),
            posterior_noise_bcfhw=torch.randn(shape, generator=generator(*names, "posterior")),
            timesteps_b=torch.tensor([int(1000 * uniform(*names, "timestep"))]),
            image_latents_bcfhw=stock_image_latents(pipeline, config, sample, seed),
            variant=variant,
        )
        assert_equal_in_every_bit(cached, fresh, variant)
    assert len(used) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_tensors_are_the_pipelines(settings: Callable[..., EncodeConfig], family: Family) -> None:
    config = settings(family, frames=17, size="48x80")
    encode_all(config)
    reader, pipeline = CacheReader(config.shards), stock_pipeline(config.model)
    assert len(reader.samples) == 8
    for sample in reader.samples:
        moments = reader.read(LATENTS, sample.latents).tensors["moments"]
        assert moments.shape == (32, 5, 6, 10)
        assert torch.equal(moments, stock_moments(pipeline, config, sample))
        embedding = reader.read(TEXT, sample.text).tensors["prompt_embeds"]
        # Eight captions at once: matrix products of another shape may round otherwise in the last bits.
        torch.testing.assert_close(embedding, stock_embedding(pipeline, sample.caption), rtol=1e-5, atol=1e-6)
    empty = reader.read(TEXT, reader.manifest.unconditional)
    torch.testing.assert_close(empty.tensors["prompt_embeds"], stock_embedding(pipeline, ""))
    assert empty.facts["caption"] == ""


@pytest.mark.parametrize(("vae", "text"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_half_precision_is_stored_as_such(settings: Callable[..., EncodeConfig], vae: str, text: str) -> None:
    config = settings(vae_dtype=vae, text_dtype=text, text_batch_size=1)
    encode_all(config)
    reader = CacheReader(config.shards)
    vae_side, text_side = stock_pipeline(config.model, vae), stock_pipeline(config.model, text)
    for sample in reader.samples[:2]:
        moments = reader.read(LATENTS, sample.latents).tensors["moments"]
        assert moments.dtype == torch_dtype(vae)
        assert torch.equal(moments, stock_moments(vae_side, config, sample))
        embedding = reader.read(TEXT, sample.text).tensors["prompt_embeds"]
        assert embedding.dtype == torch_dtype(text)
        assert torch.equal(embedding, stock_embedding(text_side, sample.caption))


def test_auto_takes_the_precision_of_the_weights(
    settings: Callable[..., EncodeConfig], tmp_path: Path
) -> None:
    from cogcache.tiny import build_tiny_model

    config = settings(model=str(build_tiny_model(tmp_path / "half", "5b", dtype="bfloat16")))
    manifest = encode_all(config).manifest
    assert manifest is not None
    assert manifest.series[LATENTS].fingerprint["vae_dtype"] == "bfloat16"
    assert manifest.series[TEXT].fingerprint["text_dtype"] == "bfloat16"
    reader = CacheReader(config.shards)
    assert reader.read(LATENTS, reader.samples[0].latents).tensors["moments"].dtype == torch.bfloat16


def test_equal_captions_share_an_embedding(settings: Callable[..., EncodeConfig]) -> None:
    result = encode_all(settings())
    reader = CacheReader(result.shards)
    assert len({sample.text for sample in reader.samples}) == 7
    assert result.captions == 8  # seven and the empty one
    assert len({sample.latents for sample in reader.samples}) == 8


def test_edited_caption_touches_no_latent(
    settings: Callable[..., EncodeConfig], clips_root: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(clips_root, tmp_path / "clips")
    config = settings(data_root=root)
    before = encode_all(config)
    ids = [sample.id for sample in CacheReader(config.shards).samples]
    (root / "4.txt").write_text("A meadow in the evening", "utf-8")
    after = encode_all(config)
    assert (after.encoded, after.captions) == (0, 1)
    assert before.manifest is not None
    assert after.manifest is not None
    assert after.manifest.series[LATENTS] == before.manifest.series[LATENTS]
    samples = CacheReader(config.shards).samples
    assert [sample.id for sample in samples] == ids
    assert "A meadow in the evening" in {sample.caption for sample in samples}


def test_changed_clip_is_encoded_anew(
    settings: Callable[..., EncodeConfig], clips_root: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(clips_root, tmp_path / "clips")
    config = settings(data_root=root)
    encode_all(config)
    shutil.copy(root / "5.mp4", root / "4.mp4")
    result = encode_all(config)
    assert (result.encoded, result.captions) == (0, 0)  # same content as clip 5: its latent serves both
    by_source = {sample.source: sample for sample in CacheReader(config.shards).samples}
    assert by_source["4.mp4"].latents == by_source["5.mp4"].latents
    assert by_source["4.mp4"].id != by_source["5.mp4"].id


def test_values_that_are_not_finite_fail_the_clip(
    settings: Callable[..., EncodeConfig], tiny_models: Callable[[Family], Path], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_models("5b"), tmp_path / "model")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_out.conv.bias"][0] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    result = encode_all(settings(model=str(model)))
    assert len(result.failures) == 8
    assert all("not finite" in failure.reason for failure in result.failures)
    assert not CacheReader(result.shards).samples
    rows = [json.loads(line) for line in (result.shards / "failures.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows} == {f"{n}.mp4" for n in range(8)}
