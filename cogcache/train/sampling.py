"""Denoising with the training transformer, bit for bit what the stock pipelines compute.

``CogVideoXPipeline`` and ``CogVideoXImageToVideoPipeline`` are followed, not imported: their modules bring
the VAE and T5 along. Static guidance; eta 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cogcache.train.positions import rotary_tables
from cogcache.train.tasks import task_for
from cogcache.variants import Variant

__all__ = ["sample_latents"]


@torch.no_grad()
def sample_latents(
    transformer: nn.Module,
    scheduler: Any,
    prompt_embeds_bld: Tensor,
    unconditional_bld: Tensor,
    *,
    noise_bpchw: Tensor,
    variant: Variant,
    steps: int,
    guidance: float,
    generator: torch.Generator | None = None,
    image_latents_bcfhw: Tensor | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> Tensor:
    """Denoise ``noise_bpchw`` to scaled latents [B, P, C, H, W], padding frames in front included.

    Args:
        transformer: The bare transformer, in the mode it shall run in.
        scheduler: ``CogVideoXDDIMScheduler`` or ``CogVideoXDPMScheduler``; a fresh one like it is used.
        prompt_embeds_bld: Embeddings of the prompts.
        unconditional_bld: Those of the empty prompt; not used where ``guidance`` is at most 1.
        noise_bpchw: Starting noise for all padded frames. Its dtype and device are those of the sampling.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        generator: Gives the noise of DPM's steps.
        image_latents_bcfhw: Image-to-video only: unscaled latents of the first frames [B, C, 1, H, W].
        go_on: Asked before every step; once it says no, what is there is returned.
    """
    dtype, device = noise_bpchw.dtype, noise_bpchw.device
    guided = guidance > 1.0
    embeds = torch.cat([unconditional_bld, prompt_embeds_bld]) if guided else prompt_embeds_bld
    embeds = embeds.to(device, dtype)
    images = image_latents_bcfhw
    if images is not None:
        images = torch.cat([images] * 2 if guided else [images]).to(device)
    rotary = rotary_tables(variant, noise_bpchw.shape[1], *noise_bpchw.shape[-2:], device)
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(steps, device=device)
    advance = _stepper(fresh, generator)
    task = task_for(variant)

    latents: Tensor = noise_bpchw * fresh.init_noise_sigma
    for timestep in fresh.timesteps:
        if not go_on():
            break
        doubled = torch.cat([latents] * 2) if guided else latents
        hidden, extra = task.model_input(doubled, images, variant, dtype)
        prediction = transformer(
            hidden_states=hidden,
            encoder_hidden_states=embeds,
            timestep=timestep.expand(len(doubled)),
            image_rotary_emb=rotary,
            return_dict=False,
            **extra,
        )[0].float()
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance * (conditional - unconditional)
        latents = advance(prediction, timestep, latents).to(dtype)
    return latents


def _stepper(scheduler: Any, generator: torch.Generator | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One step of either scheduler; DPM's is multistep and remembers its last estimate."""
    from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler

    options = {"eta": 0.0, "generator": generator, "return_dict": False}
    multistep = isinstance(scheduler, CogVideoXDPMScheduler)
    estimate: Tensor | None = None
    before: Tensor | None = None

    def step(prediction: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        nonlocal estimate, before
        if not multistep:
            denoised: Tensor = scheduler.step(prediction, t, latents, **options)[0]
            return denoised
        latents, estimate = scheduler.step(prediction, estimate, t, before, latents, **options)
        before = t
        return latents

    return step
