"""Sampling with the training transformer equals the stock pipelines, bit for bit.

Mutations tried, each caught: padding dropped at the end; guidance the other way round; no multistep memory; the image
scaled by the factor where it must be divided; ofs left out; noise of DPM from another generator; decoding without the
scaling factor; a scheduler that remembers the run before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from cogcache.decode import open_decoder
from cogcache.geometry import Size
from cogcache.tiny import FAMILIES, Family
from cogcache.tiny.families import facts_of
from cogcache.train.objective import padded_frames
from cogcache.train.sampling import sample_latents
from cogcache.variants import Variant, read_variant

SIZE = Size(64, 96)
CPU = torch.device("cpu")
UNGUIDED = {("2b", "ddim"), ("5b-i2v", "ddim")}
DECODED = {("5b", "ddim"), ("1.5-5b", "dpm")}  # as pictures, too, which takes long


def pipeline(root: Path, family: Family, sampler: str) -> Any:
    pipe = getattr(diffusers, facts_of(family).pipeline).from_pretrained(root)
    kind = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}[sampler]
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def starting_noise(variant: Variant, frames: int) -> torch.Tensor:
    c, f, h, w = variant.latent_shape(frames, SIZE)
    shape = (1, padded_frames(f, variant.patch_size_t), c, h, w)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_latents_and_pictures_are_those_of_the_stock_pipeline(
    tiny_models: Callable[[Family], Path], family: Family, sampler: str
) -> None:
    root = tiny_models(family)
    pipe, variant = pipeline(root, family, sampler), read_variant(root)
    pipe.vae.enable_tiling()  # 64x96 is larger than the tiny model's tile
    frames, guidance, steps = 9, 1.0 if (family, sampler) in UNGUIDED else 6.0, 3
    noise = starting_noise(variant, frames)
    prompt, empty = torch.randn(2, 1, variant.text_length, variant.text_dim)
    inputs = {"prompt_embeds": prompt, "negative_prompt_embeds": empty, "latents": noise}
    inputs |= {"height": 64, "width": 96, "num_frames": frames}
    inputs |= {"num_inference_steps": steps, "guidance_scale": guidance}
    ours = torch.Generator().manual_seed(5)
    image_latents = None
    if variant.task == "i2v":
        pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        inputs["image"] = Image.fromarray(pixels)
        ready = pipe.video_processor.preprocess(inputs["image"], height=64, width=96)
        image_latents = pipe.vae.encode(ready[:, :, None]).latent_dist.sample(ours)
    theirs: dict[str, Any] = {}
    for kind in ("latent", "np") if (family, sampler) in DECODED else ("latent",):
        theirs[kind] = pipe(**inputs, generator=torch.Generator().manual_seed(5), output_type=kind).frames

    latents = sample_latents(
        pipe.transformer.train(),
        pipe.scheduler,
        prompt,
        empty,
        noise_bpchw=noise,
        variant=variant,
        steps=steps,
        guidance=guidance,
        generator=ours,
        image_latents_bcfhw=image_latents,
    )
    assert torch.equal(latents, theirs["latent"])
    assert not torch.equal(latents, noise)
    if (family, sampler) not in DECODED:
        return
    kept = variant.latent_shape(frames, SIZE)[1]
    with open_decoder(root, torch.float32, CPU, SIZE) as decoder:
        video = decoder.decode(latents[0, -kept:])
    assert video.shape == (frames, 64, 96, 3)
    assert np.array_equal(video, (theirs["np"][0] * 255).round().astype(np.uint8))


def test_the_decoder_has_no_encoder_and_tiles_only_what_is_larger_than_a_tile(
    tiny_models: Callable[[Family], Path],
) -> None:
    root = tiny_models("5b")
    for size, tiled in ((Size(64, 96), True), (Size(48, 80), False)):
        with open_decoder(root, torch.float32, CPU, size) as decoder:
            assert decoder._vae.encoder is None
            assert decoder._vae.use_tiling == tiled
            video = decoder.decode(torch.randn(3, 16, size.height // 8, size.width // 8))
            assert video.shape == (9, size.height, size.width, 3)


def test_pictures_that_are_not_numbers_do_not_stop_a_run(tiny_models: Callable[[Family], Path]) -> None:
    with open_decoder(tiny_models("5b"), torch.float32, CPU, Size(32, 48)) as decoder:
        assert decoder.decode(torch.full((1, 16, 4, 6), torch.nan)).max() == 0


def test_sampling_stops_when_asked(tiny_models: Callable[[Family], Path]) -> None:
    root = tiny_models("5b")
    pipe, variant = pipeline(root, "5b", "ddim"), read_variant(root)
    noise, answers = starting_noise(variant, 9), iter([True, False])
    prompt = torch.zeros(1, variant.text_length, variant.text_dim)
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    sample_latents(
        pipe.transformer,
        pipe.scheduler,
        prompt,
        prompt,
        noise_bpchw=noise,
        variant=variant,
        steps=4,
        guidance=1.0,
        go_on=lambda: next(answers),
    )
    assert len(calls) == 1
