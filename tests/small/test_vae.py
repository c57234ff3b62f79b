"""The small VAE that the package has: it can draw the made-up world, and film that it never saw nearly as well."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from behaviour_kit import psnr

from cogcache.demo.run import CLIPS
from cogcache.geometry import Size
from cogcache.small import Scene, render
from cogcache.small.architecture import FRAMES, HEIGHT, WIDTH, small_facts
from cogcache.small.shipped import WEIGHTS
from cogcache.video import ClipRequest, load_clip

SCENES_DB, FILM_DB = 30.0, 24.0
"""Of the mean over clips; the recipe's aim is 28. Over all clips held out, as files, 36.0 and 26.3 (``reached.json``);
these scenes, with colours not blurred by a file's 4:2:0, 32.7."""

DECODED_FAR_DB = 15.0
"""What another clip's latents give: far below."""


@pytest.fixture(scope="module")
def vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX.from_pretrained(WEIGHTS / "vae", dtype=torch.float32).eval()


def rebuilt(vae: torch.nn.Module, clip_fhwc: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W, 3] there and back by the posterior's mean."""
    pixels = torch.from_numpy(clip_fhwc).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1)
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    return decoded[0].clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def test_scenes_come_back(vae: torch.nn.Module) -> None:
    scenes = [
        Scene("triangle", "red", "large", "moves up", "dark blue", 10**6 + 1),
        Scene("star", "pink", "large", "moves down", "grey", 10**6 + 2),  # no clip showed either word
    ]
    clips = [render(scene, FRAMES, HEIGHT, WIDTH) for scene in scenes]
    found = [psnr(rebuilt(vae, clip), clip) for clip in clips]
    print(found)
    assert np.mean(found) > SCENES_DB


def test_film_that_it_never_saw_comes_back(vae: torch.nn.Module) -> None:
    request = ClipRequest(FRAMES, Size(HEIGHT, WIDTH), fps=8.0)
    clips = [
        load_clip(CLIPS / "videos" / name, request).frames.numpy()
        for name in ("03_bird.mp4", "07_rodents.mp4")
    ]
    made = [rebuilt(vae, clip) for clip in clips]
    found = [psnr(a, b) for a, b in zip(made, clips, strict=True)]
    swapped = [psnr(a, b) for a, b in zip(made, clips[1:] + clips[:1], strict=True)]
    print(found, swapped)
    assert np.mean(found) > FILM_DB
    assert max(swapped) < DECODED_FAR_DB


def test_latents_have_the_spread_that_the_families_say(vae: torch.nn.Module) -> None:
    clip = torch.from_numpy(
        render(Scene("cross", "yellow", "large", "moves up", "grey"), FRAMES, HEIGHT, WIDTH)
    )
    with torch.inference_mode():
        mean = vae.encode(clip.permute(3, 0, 1, 2)[None].float().div(127.5).sub(1)).latent_dist.mean
    assert mean.shape == (1, 16, 5, 12, 18)
    assert 0.3 < float(mean.std()) * small_facts("t2v").scaling_factor < 1.5
