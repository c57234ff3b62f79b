"""The training objective: one published function from a clip's latents to its loss.

Names of tensors end in their shape: ``b`` batch, ``c`` channels, ``f`` latent frames, ``p`` latent frames
after padding, ``h``/``w`` latent height and width, ``l`` text positions, ``d`` text width.

The way of one sample, all in float32 until the single cast before the transformer::

    moments_bcfhw -> posterior sample -> scaled -> layout bfchw -> front padding -> noise
        -> cast -> transformer -> v loss

Arbiter throughout is what the stock diffusers pipelines do with the trained weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cogcache.cache.moments import LOGVAR_RANGE
from cogcache.train.positions import rotary_tables
from cogcache.train.tasks import task_for
from cogcache.variants import Variant

__all__ = [
    "add_noise",
    "alphas_cumprod",
    "loss_per_sample",
    "model_dtype",
    "pad_front",
    "padded_frames",
    "sample_posterior",
    "velocity",
]


def loss_per_sample(
    transformer: nn.Module,
    scheduler: Any,
    latents_bcfhw: Tensor,
    prompt_embeds_bld: Tensor,
    *,
    noise_bpchw: Tensor,
    timesteps_b: Tensor,
    variant: Variant,
    posterior_noise_bcfhw: Tensor | None = None,
    image_latents_bcfhw: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean squared error on v of each sample, float32 [B], in the units of scaled latents squared.

    The mean runs over all latent elements, those of the padding frames of CogVideoX 1.5 included: the
    pipeline denoises these frames with the rest and other frames attend to them, so the model must predict
    them too.

    Args:
        transformer: A ``CogVideoXTransformer3DModel``, bare or wrapped for data parallelism.
        scheduler: The checkpoint's scheduler; only its ``alphas_cumprod`` is used, which holds the SNR
            shift and the zero terminal SNR.
        latents_bcfhw: Unscaled latents, or with ``posterior_noise_bcfhw`` unscaled posterior moments [B,
            2C, F, H, W] (mean, then log-variance); any floating dtype.
        prompt_embeds_bld: Text embeddings of full length.
        noise_bpchw: Standard normal noise in the transformer's layout, for :func:`padded_frames` frames,
            float32.
        timesteps_b: int64 in [0, number of training timesteps), one per sample.
        variant: Facts of the checkpoint.
        posterior_noise_bcfhw: Standard normal noise [B, C, F, H, W] that picks the posterior sample.
        image_latents_bcfhw: Image-to-video only: unscaled latents of the first frame [B, C, 1, H, W];
            zeros where the condition is dropped.
        dtype: Dtype the transformer runs in. Default: that of its patch embedding.

    Raises:
        ValueError: if a tensor is missing or its shape does not fit the others.
    """
    clean_bpchw = _clean_latents(latents_bcfhw, posterior_noise_bcfhw, variant)
    if noise_bpchw.shape != clean_bpchw.shape:
        raise ValueError(f"noise is {tuple(noise_bpchw.shape)}, the padded latent {tuple(clean_bpchw.shape)}")
    abar_b = alphas_cumprod(scheduler, clean_bpchw.device)[timesteps_b]
    noisy_bpchw = add_noise(clean_bpchw, noise_bpchw.float(), abar_b)
    target_bpchw = velocity(clean_bpchw, noise_bpchw.float(), abar_b)

    dtype = dtype or model_dtype(transformer)
    hidden, extra = task_for(variant).model_input(noisy_bpchw, image_latents_bcfhw, variant, dtype)
    frames, height, width = clean_bpchw.shape[1], *clean_bpchw.shape[-2:]
    prediction_bpchw: Tensor = transformer(
        hidden_states=hidden,
        encoder_hidden_states=prompt_embeds_bld.to(dtype),
        timestep=timesteps_b,
        image_rotary_emb=rotary_tables(variant, frames, height, width, clean_bpchw.device),
        return_dict=False,
        **extra,
    )[0]
    error_bpchw: Tensor = prediction_bpchw.float() - target_bpchw
    return error_bpchw.square().flatten(1).mean(1)


def _clean_latents(latents_bcfhw: Tensor, posterior_noise_bcfhw: Tensor | None, variant: Variant) -> Tensor:
    """Scaled, padded float32 latents in the transformer's layout [B, P, C, H, W].

    Videos are always multiplied by ``scaling_factor``, because the pipelines' ``decode_latents`` always
    divides by it, whatever ``invert_scale_latents`` says.
    """
    channels = latents_bcfhw.shape[1]
    expected = variant.latent_channels * (1 if posterior_noise_bcfhw is None else 2)
    if channels != expected:
        raise ValueError(
            f"latents have {channels} channels, {expected} expected: moments need posterior noise"
        )
    if posterior_noise_bcfhw is None:
        sample_bcfhw = latents_bcfhw.float()
    else:
        sample_bcfhw = sample_posterior(latents_bcfhw, posterior_noise_bcfhw)
    scaled_bfchw = (sample_bcfhw * variant.scaling_factor).transpose(1, 2)
    return pad_front(scaled_bfchw, variant.patch_size_t)


def sample_posterior(moments_bcfhw: Tensor, noise_bcfhw: Tensor) -> Tensor:
    """mean + exp(logvar / 2) * noise in float32, log-variance clamped to [-30, 20].

    Args:
        moments_bcfhw: [B, 2C, F, H, W], mean then log-variance.
        noise_bcfhw: [B, C, F, H, W].
    """
    mean, logvar = moments_bcfhw.float().chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * noise_bcfhw.float()


def padded_frames(frames: int, patch_size_t: int | None) -> int:
    """Latent frames after padding: the next multiple of ``patch_size_t``; unchanged without one."""
    return frames if patch_size_t is None else -(-frames // patch_size_t) * patch_size_t


def pad_front(latents_bfchw: Tensor, patch_size_t: int | None) -> Tensor:
    """Prepend copies of the first latent frame until the frame count divides by ``patch_size_t``.

    The pipelines drop the *leading* frames after sampling, so the padding belongs in front.
    """
    missing = padded_frames(latents_bfchw.shape[1], patch_size_t) - latents_bfchw.shape[1]
    if not missing:
        return latents_bfchw
    return torch.cat([latents_bfchw[:, :1].expand(-1, missing, -1, -1, -1), latents_bfchw], dim=1)


def alphas_cumprod(scheduler: Any, device: torch.device) -> Tensor:
    """The scheduler's cumulative alphas as float32 [T] on ``device``.

    The scheduler's own ``add_noise`` casts them to the latents' dtype; in bfloat16 t=0 and t=1 then carry no
    noise at all. Here they are never less than float32.
    """
    alphas_t: Tensor = scheduler.alphas_cumprod.to(device=device, dtype=torch.float32)
    return alphas_t


def add_noise(clean: Tensor, noise: Tensor, abar_b: Tensor) -> Tensor:
    """sqrt(abar) clean + sqrt(1 - abar) noise, in float32."""
    signal, spread = _coefficients(abar_b, clean.ndim)
    return signal * clean + spread * noise


def velocity(clean: Tensor, noise: Tensor, abar_b: Tensor) -> Tensor:
    """The v target, sqrt(abar) noise - sqrt(1 - abar) clean, float32 (Salimans, Ho 2022, appendix D)."""
    signal, spread = _coefficients(abar_b, clean.ndim)
    return signal * noise - spread * clean


def _coefficients(abar_b: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    shape = (-1,) + (1,) * (ndim - 1)
    return abar_b.sqrt().view(shape), (1 - abar_b).sqrt().view(shape)


def model_dtype(transformer: nn.Module) -> torch.dtype:
    """The dtype of the patch embedding's weight, whatever wraps the transformer or the layer."""
    bare: Any = getattr(transformer, "module", transformer)
    dtype: torch.dtype = bare.patch_embed.proj.weight.dtype
    return dtype
