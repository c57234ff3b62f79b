"""The stock pipelines, driven through their own methods, beside what our trainer makes of the same clips.

One batch of four clips stands at four timesteps, 0 and 999 among them. Everything random is drawn once, the way the
pipelines draw it: posterior samples and noise from one generator in their order, then handed to the trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXVideoToVideoPipeline
from torch import Tensor, nn

from cogcache.config import TrainConfig
from cogcache.geometry import Size
from cogcache.lora import Provenance
from cogcache.train import model, objective
from cogcache.train.model import load_scheduler, load_transformer, trainable
from cogcache.variants import Variant, read_variant

CPU = torch.device("cpu")
TIMESTEPS = torch.tensor([0, 1, 417, 999])
BATCH = len(TIMESTEPS)
SEED = 7


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Stock:
    """A family's pipeline with a LoRA (alpha half its rank) loaded from our file, and our trainer's side of it.

    Attributes:
        moments, posterior, noise, text, image: What the trainer is given, named as in ``loss_per_sample``.
        sample: Unscaled posterior sample [B, C, F, H, W].
        steps: For each of ``TIMESTEPS`` what the pipeline gave its transformer, and what came out.
    """

    def __init__(self, root: Path, frames: int, size: Size, folder: Path) -> None:
        self.root, self.frames, self.size = root, frames, size
        self.variant: Variant = read_variant(root)
        kind = CogVideoXImageToVideoPipeline if self.variant.task == "i2v" else CogVideoXPipeline
        self.pipe: Any = kind.from_pretrained(root)
        self.pipe.set_progress_bar_config(disable=True)
        self.scheduler = load_scheduler(root)
        self.trained = _with_lora(root)
        file = folder / "pytorch_lora_weights.safetensors"
        model.write_lora(file, self.trained, Provenance(base_model=str(root), variant=self.variant))
        self.pipe.load_lora_weights(file)
        self._draw()
        self.steps = self._run()

    @torch.no_grad()
    def _draw(self) -> None:
        v, source = self.variant, torch.Generator().manual_seed(SEED)
        video = normal(BATCH, 3, self.frames, self.size.height, self.size.width).mul(0.5).clamp(-1, 1)
        posteriors = [self.pipe.vae.encode(clip[None]).latent_dist for clip in video]
        self.moments = torch.cat([posterior.parameters for posterior in posteriors])
        self.sample = torch.cat([posterior.sample(source) for posterior in posteriors])
        drawn = torch.randn(self.sample.transpose(1, 2).shape, generator=source)
        again = torch.Generator().manual_seed(SEED)
        self.posterior = torch.cat([torch.randn(m[None].shape, generator=again) for m in self.sample])
        frames, padded = drawn.shape[1], self.padded
        self.noise = torch.cat([normal(BATCH, padded - frames, *drawn.shape[2:], seed=3), drawn], dim=1)
        self.video = video
        self.text = normal(BATCH, v.text_length, v.text_dim, seed=4)
        self.picture = video[:, :, 0] if v.task == "i2v" else None
        self.image = None
        if self.picture is not None:
            source = torch.Generator().manual_seed(SEED)
            encoded = [
                self.pipe.vae.encode(p[None, :, None]).latent_dist.sample(source) for p in self.picture
            ]
            self.image = torch.cat(encoded)

    @property
    def padded(self) -> int:
        """Latent frames that the pipeline denoises: as many as ``patch_size_t`` asks for."""
        frames, patch = (self.frames - 1) // 4 + 1, self.variant.patch_size_t or 1
        return frames + -frames % patch

    @torch.no_grad()
    def noisy(self) -> Tensor:
        """The clips [B, P, C, H, W], each at its timestep: scaled and noised by the video-to-video pipeline.

        It knows no padding, so the padding frames are noised here, with the pipeline's scheduler and factor.
        """
        parts = {name: part for name, part in self.pipe.components.items() if name != "image_encoder"}
        pipe: Any = CogVideoXVideoToVideoPipeline(**parts)
        result: Tensor = pipe.prepare_latents(
            self.video, BATCH, self.sample.shape[1], self.size.height, self.size.width, torch.float32, CPU,
            torch.Generator().manual_seed(SEED), None, TIMESTEPS,
        )  # fmt: skip
        missing = self.padded - self.sample.shape[2]
        if not missing:
            return result
        first = (self.sample[:, :, :1] * pipe.vae_scaling_factor_image).transpose(1, 2)
        first = first.expand(-1, missing, -1, -1, -1)
        extra = self.pipe.scheduler.add_noise(first, self.noise[:, :missing], TIMESTEPS)
        return torch.cat([extra, result], dim=1)

    def _run(self) -> list[tuple[dict[str, Any], Tensor]]:
        """One call of the pipeline that visits all timesteps, its latents put back before each step.

        Only the clip that stands at a step's timestep is right in that step.
        """
        noisy = self.noisy()
        seen: list[tuple[dict[str, Any], Tensor]] = []

        def keep(_: nn.Module, arguments: tuple[()], given: dict[str, Any], result: tuple[Tensor]) -> None:
            assert not arguments
            seen.append((given, result[0]))

        hook = self.pipe.transformer.register_forward_hook(keep, with_kwargs=True)
        self.call(noisy, TIMESTEPS, noisy, output_type="latent")
        hook.remove()
        assert len(seen) == BATCH
        return seen

    def call(self, latents: Tensor, timesteps: Tensor, put_back: Tensor | None = None, **more: Any) -> Any:
        """Run the pipeline without guidance from ``latents`` over the given timesteps."""
        scheduler, rows = self.pipe.scheduler, slice(len(latents))
        original = scheduler.set_timesteps

        def set_timesteps(count: int, device: Any = None) -> None:
            original(count, device)
            scheduler.timesteps = timesteps

        scheduler.set_timesteps = set_timesteps
        if self.picture is not None:
            more |= {"image": self.picture[rows] / 2 + 0.5, "generator": torch.Generator().manual_seed(SEED)}
        if put_back is not None:
            more["callback_on_step_end"] = lambda *_: {"latents": put_back}
        try:
            return self.pipe(
                prompt_embeds=self.text[rows], latents=latents, num_inference_steps=len(timesteps),
                num_frames=self.frames, height=self.size.height, width=self.size.width,
                guidance_scale=1.0, max_sequence_length=self.variant.text_length, **more,
            ).frames  # fmt: skip
        finally:
            del scheduler.set_timesteps

    def loss(self, transformer: Any, **more: Any) -> Tensor:
        """Our loss of the batch, by the published function."""
        return objective.loss_per_sample(
            transformer,
            self.scheduler,
            self.moments,
            self.text,
            noise_bpchw=self.noise,
            timesteps_b=TIMESTEPS,
            variant=self.variant,
            posterior_noise_bcfhw=self.posterior,
            image_latents_bcfhw=self.image,
            **more,
        )

    def observed(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], Tensor]:
        """What our trainer gives the transformer, and the target that it pulls its output to.

        The transformer is replaced by one that answers zeros; the gradient of the squared error says what
        would have been right.
        """
        seen: dict[str, Any] = {}
        answer = torch.zeros(self.noise.shape, requires_grad=True)

        def transformer(**given: Any) -> tuple[Tensor]:
            seen.update(given)
            return (answer,)

        losses = self.loss(transformer, dtype=dtype)
        (gradient,) = torch.autograd.grad(losses.sum(), answer)
        return seen, gradient * (-answer[0].numel() / 2)


def _with_lora(root: Path) -> nn.Module:
    """The training transformer with a strong LoRA: alpha 2 at rank 4."""
    transformer = load_transformer(root, torch.float32)
    model.add_lora(transformer, TrainConfig(shards=Path("none"), rank=4, alpha=2.0))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(trainable(transformer).items()):
            if "lora_B" in name:
                parameter.copy_(0.2 * normal(*parameter.shape, seed=number))
    return transformer
