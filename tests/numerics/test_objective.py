"""The objective against the installed schedulers and pipelines.

Mutations tried, each caught: scaling by 1/scaling_factor; padding appended instead of prepended; one timestep for
the whole batch; one mean over the batch; posterior mean instead of a sample; log-variance not clamped; alphas cast to
bfloat16 before noising; v target with the signs swapped; another ``ofs``; image latent multiplied where the pipeline
divides; image latent in every frame; image before video on the channel axis.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from cogcache.geometry import Size
from cogcache.tiny import FAMILIES, Family
from cogcache.train.model import load_scheduler, load_transformer
from cogcache.train.objective import (
    add_noise,
    alphas_cumprod,
    loss_per_sample,
    pad_front,
    padded_frames,
    sample_posterior,
    velocity,
)
from cogcache.train.positions import rotary_tables
from cogcache.train.tasks import image_scale, task_for
from cogcache.variants import Variant, read_variant

CPU = torch.device("cpu")
TIMESTEPS = torch.tensor([0, 1, 417, 999])
Models = Callable[[Family], Path]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Case:
    """Inputs of one call, with a batch of different timesteps, 0 and the last among them."""

    def __init__(self, root: Path, frames: int, size: Size) -> None:
        self.variant = read_variant(root)
        c, f, h, w = self.variant.latent_shape(frames, size)
        b = len(TIMESTEPS)
        self.moments = torch.cat([normal(b, c, f, h, w), normal(b, c, f, h, w, seed=1) - 2], dim=1)
        self.posterior = normal(b, c, f, h, w, seed=2)
        self.noise = normal(b, padded_frames(f, self.variant.patch_size_t), c, h, w, seed=3)
        self.text = normal(b, self.variant.text_length, self.variant.text_dim, seed=4)
        self.image = normal(b, c, 1, h, w, seed=5) if self.variant.task == "i2v" else None

    def loss(self, transformer: Any, scheduler: Any, **changes: Any) -> Tensor:
        arguments: dict[str, Any] = {
            "noise_bpchw": self.noise,
            "timesteps_b": TIMESTEPS,
            "variant": self.variant,
            "posterior_noise_bcfhw": self.posterior,
            "image_latents_bcfhw": self.image,
        }
        return loss_per_sample(transformer, scheduler, self.moments, self.text, **{**arguments, **changes})


def stock_loss(case: Case, transformer: Any, scheduler: Any) -> Tensor:
    """The same loss by other means: diffusers' distribution, add_noise, get_velocity, and the pipeline's call."""
    v = case.variant
    distribution = DiagonalGaussianDistribution(case.moments)
    latents = distribution.mean + distribution.std * case.posterior
    latents = (latents * v.scaling_factor).permute(0, 2, 1, 3, 4)
    while latents.shape[1] % (v.patch_size_t or 1):
        latents = torch.cat([latents[:, 0:1], latents], dim=1)
    noisy = scheduler.add_noise(latents, case.noise, TIMESTEPS)
    target = scheduler.get_velocity(latents, case.noise, TIMESTEPS)
    hidden, extra = noisy, {}
    if case.image is not None:
        image = torch.zeros_like(noisy)
        scale = 1 / v.scaling_factor if v.invert_scale_latents else v.scaling_factor
        image[:, 0] = scale * case.image[:, :, 0]
        hidden = torch.cat([noisy, image], dim=2)
    if v.ofs:
        extra["ofs"] = noisy.new_full((1,), fill_value=2.0)
    predicted = transformer(
        hidden_states=hidden,
        encoder_hidden_states=case.text,
        timestep=TIMESTEPS,
        image_rotary_emb=rotary_tables(v, hidden.shape[1], *hidden.shape[-2:], CPU),
        return_dict=False,
        **extra,
    )[0]
    return torch.stack([((predicted[i] - target[i]) ** 2).mean() for i in range(len(target))])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("frames", "size"), [(17, Size(64, 96)), (9, Size(32, 48))])
def test_loss_per_sample_equals_the_stock_way(
    tiny_models: Models, family: Family, frames: int, size: Size
) -> None:
    root = tiny_models(family)
    size = size if family != "5b-i2v" else Size(64, 96)
    case = Case(root, frames, size)
    transformer = CogVideoXTransformer3DModel.from_pretrained(root, subfolder="transformer")
    scheduler = load_scheduler(root)
    with torch.no_grad():
        ours, theirs = case.loss(transformer, scheduler), stock_loss(case, transformer, scheduler)
    assert ours.shape == (len(TIMESTEPS),)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["2b", "5b", "1.5-5b"])
def test_v_loss_equals_the_reference_form_on_the_clean_latent(tiny_models: Models, family: Family) -> None:
    """(x0_estimate - x0)^2 / (1 - abar), the reference trainer's form, is the same number."""
    root = tiny_models(family)
    case, scheduler = Case(root, 9, Size(32, 48)), load_scheduler(root)
    seen: dict[str, Tensor] = {}

    def transformer(**inputs: Any) -> tuple[Tensor]:
        seen.update(inputs)
        return (case.noise * 0.5,)

    ours = case.loss(transformer, scheduler, dtype=torch.float32)
    estimate = scheduler.get_velocity(case.noise * 0.5, seen["hidden_states"], TIMESTEPS)
    clean = pad_front(
        (sample_posterior(case.moments, case.posterior) * case.variant.scaling_factor).transpose(1, 2),
        case.variant.patch_size_t,
    )
    weight = 1 / (1 - alphas_cumprod(scheduler, CPU)[TIMESTEPS])
    reference = weight * (estimate - clean).square().flatten(1).mean(1)
    torch.testing.assert_close(ours, reference, rtol=2e-3, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_and_velocity_equal_the_checkpoints_scheduler(tiny_models: Models, family: Family) -> None:
    scheduler = load_scheduler(tiny_models(family))
    clean, noise = normal(4, 3, 16, 4, 6), normal(4, 3, 16, 4, 6, seed=1)
    abar = alphas_cumprod(scheduler, CPU)[TIMESTEPS]
    assert torch.equal(add_noise(clean, noise, abar), scheduler.add_noise(clean, noise, TIMESTEPS))
    assert torch.equal(velocity(clean, noise, abar), scheduler.get_velocity(clean, noise, TIMESTEPS))


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize(("shift", "family"), [(3.0, "2b"), (1.0, "5b")])
def test_alphas_follow_the_formula(tiny_models: Models, kind: Any, shift: float, family: Family) -> None:
    """Betas, then the SNR shift, then the zero terminal SNR, computed here in float64 by hand."""
    assert read_variant(tiny_models(family)).snr_shift_scale == shift
    scheduler = kind.from_config(load_scheduler(tiny_models(family)).config)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    root = (abar / (shift + (1 - shift) * abar)).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    ours = alphas_cumprod(scheduler, CPU)
    assert ours.dtype == torch.float32
    assert ours[-1] == 0
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-9)


def test_naive_bfloat16_noising_loses_small_timesteps_and_ours_does_not(tiny_models: Models) -> None:
    """At t=0 and t=1 the scheduler's own add_noise in bfloat16 adds no noise at all."""
    scheduler = load_scheduler(tiny_models("5b"))
    clean, noise = normal(4, 3, 16, 4, 6), normal(4, 3, 16, 4, 6, seed=1)
    abar = alphas_cumprod(scheduler, CPU)[TIMESTEPS]
    exact = add_noise(clean.double(), noise.double(), abar.double())
    naive = scheduler.add_noise(clean.bfloat16(), noise.bfloat16(), TIMESTEPS)
    ours = add_noise(clean, noise, abar).bfloat16()
    spread = (1 - abar.double()).sqrt()
    for row in (0, 1):
        assert torch.equal(naive[row], clean.bfloat16()[row])
        lost = (exact[row] - clean.double()[row]).std() / spread[row]
        assert 0.9 < lost < 1.1
    rounding = exact.abs() * 2**-8
    assert ((ours.double() - exact).abs() <= rounding + 1e-6).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_objective_stays_near_float64(tiny_models: Models, family: Family) -> None:
    root = tiny_models(family)
    case, scheduler = Case(root, 9, Size(64, 96)), load_scheduler(root)
    exact_model = CogVideoXTransformer3DModel.from_pretrained(root, subfolder="transformer").double()
    low_model = load_transformer(root, torch.bfloat16)
    with torch.no_grad():
        exact = case.loss(exact_model, scheduler)
        low = case.loss(low_model, scheduler)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("frames", "patch_size_t", "expected"),
    [(3, None, 3), (3, 2, 4), (4, 2, 4), (21, 2, 22), (13, 2, 14), (4, 3, 6), (1, 2, 2)],
)
def test_padding_prepends_the_first_frame(frames: int, patch_size_t: int | None, expected: int) -> None:
    latents = normal(2, frames, 4, 2, 2)
    padded = pad_front(latents, patch_size_t)
    assert padded.shape[1] == expected == padded_frames(frames, patch_size_t)
    extra = expected - frames
    assert torch.equal(padded[:, extra:], latents)
    for number in range(extra):
        assert torch.equal(padded[:, number], latents[:, 0])


def test_posterior_clamps_like_diffusers() -> None:
    moments = normal(2, 8, 3, 2, 2) * 40
    noise = normal(2, 4, 3, 2, 2, seed=1)
    theirs = DiagonalGaussianDistribution(moments)
    assert moments[:, 4:].max() > 20
    assert moments[:, 4:].min() < -30
    assert torch.equal(sample_posterior(moments, noise), theirs.mean + theirs.std * noise)


def test_latents_without_posterior_noise_are_taken_as_they_are(tiny_models: Models) -> None:
    root = tiny_models("5b")
    case, scheduler = Case(root, 9, Size(32, 48)), load_scheduler(root)
    transformer = load_transformer(root, torch.float32)
    sample = sample_posterior(case.moments, case.posterior)
    with torch.no_grad():
        given = loss_per_sample(
            transformer,
            scheduler,
            sample,
            case.text,
            noise_bpchw=case.noise,
            timesteps_b=TIMESTEPS,
            variant=case.variant,
        )
        assert torch.equal(given, case.loss(transformer, scheduler))


def test_each_sample_stands_alone(tiny_models: Models) -> None:
    """A sample's loss does not depend on what else is in the batch."""
    root = tiny_models("1.5-5b")
    case, scheduler = Case(root, 9, Size(32, 48)), load_scheduler(root)
    transformer = load_transformer(root, torch.float32)
    with torch.no_grad():
        together = case.loss(transformer, scheduler)
        for i in range(len(TIMESTEPS)):
            alone = loss_per_sample(
                transformer,
                scheduler,
                case.moments[i : i + 1],
                case.text[i : i + 1],
                noise_bpchw=case.noise[i : i + 1],
                timesteps_b=TIMESTEPS[i : i + 1],
                variant=case.variant,
                posterior_noise_bcfhw=case.posterior[i : i + 1],
            )
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-5, atol=0)


def test_wrong_inputs_are_refused(tiny_models: Models) -> None:
    root = tiny_models("1.5-5b")
    case, scheduler = Case(root, 9, Size(32, 48)), load_scheduler(root)
    with pytest.raises(ValueError, match="moments need posterior noise"):
        case.loss(None, scheduler, posterior_noise_bcfhw=None)
    with pytest.raises(ValueError, match="the padded latent"):
        case.loss(None, scheduler, noise_bpchw=case.noise[:, 1:])
    with pytest.raises(ValueError, match="takes no image"):
        case.loss(None, scheduler, image_latents_bcfhw=case.posterior[:, :, :1], dtype=torch.float32)
    with pytest.raises(ValueError, match="needs image latents"):
        Case(tiny_models("5b-i2v"), 9, Size(64, 96)).loss(
            None, scheduler, image_latents_bcfhw=None, dtype=torch.float32
        )


@pytest.mark.parametrize("family", ["5b-i2v", "1.5-5b-i2v"])
@pytest.mark.parametrize("frames", [9, 17])
def test_image_condition_equals_the_pipelines_prepare_latents(
    tiny_models: Models, family: Family, frames: int
) -> None:
    """The pipeline encodes a picture; we get the very latent its VAE gives, before scaling."""
    root = tiny_models(family)
    variant: Variant = read_variant(root)
    pipe = CogVideoXImageToVideoPipeline.from_pretrained(root)
    vae: AutoencoderKLCogVideoX = pipe.vae
    picture = normal(2, 3, 64, 96).clamp(-1, 1)
    with torch.no_grad():
        posteriors = [vae.encode(p[None, :, None]).latent_dist for p in picture]
        source = torch.Generator().manual_seed(7)
        unscaled = torch.cat([posterior.sample(source) for posterior in posteriors])
        latent = (frames - 1) // 4 + 1
        padded = padded_frames(latent, variant.patch_size_t)
        _, expected = pipe.prepare_latents(
            picture,
            batch_size=2,
            num_channels_latents=variant.latent_channels,
            num_frames=frames + (padded - latent) * 4,
            height=64,
            width=96,
            dtype=torch.float32,
            device=CPU,
            generator=torch.Generator().manual_seed(7),
        )
    noisy = normal(2, padded, variant.latent_channels, 8, 12)
    hidden, extra = task_for(variant).model_input(noisy, unscaled, variant, torch.float32)
    assert torch.equal(hidden[:, :, : variant.latent_channels], noisy)
    assert torch.equal(hidden[:, :, variant.latent_channels :], expected)
    assert hidden[:, 1:, variant.latent_channels :].abs().max() == 0
    assert (extra["ofs"].tolist() == [2.0]) if variant.ofs else extra == {}


def test_image_scale_follows_the_pipelines_rule(tiny_models: Models) -> None:
    assert image_scale(read_variant(tiny_models("5b-i2v"))) == 0.7
    assert image_scale(read_variant(tiny_models("1.5-5b-i2v"))) == 1 / 0.7
