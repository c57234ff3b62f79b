"""Video-to-video with models whose patches span several latent frames (CogVideoX 1.5).

The stock pipeline refuses every clip of 8N + 1 frames there, because 2N + 1 latent frames do not divide
by the patch. This one does to a given video what training and the stock text-to-video pipeline do:
copies of the first latent frame go in front before the noise is added, and the leading frames are dropped
before decoding. All else is the stock pipeline's.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXVideoToVideoPipeline
from diffusers.utils.torch_utils import randn_tensor

__all__ = ["PaddedVideoToVideoPipeline"]


class PaddedVideoToVideoPipeline(CogVideoXVideoToVideoPipeline):  # type: ignore[misc]  # diffusers is untyped
    """:class:`CogVideoXVideoToVideoPipeline` for models with a temporal patch size."""

    def __call__(self, video: list[Any], **arguments: Any) -> Any:
        """As the stock pipeline. ``video``: PIL pictures, 8N + 1 of them.

        The pipeline counts the latent frames from the length of ``video``, so that is extended here, and
        :meth:`prepare_latents` takes the extension off again.
        """
        latent_frames = (len(video) - 1) // self.vae_scale_factor_temporal + 1
        self._extra = -latent_frames % self.transformer.config.patch_size_t
        extension = [video[0]] * (self._extra * self.vae_scale_factor_temporal)
        return super().__call__(video=extension + video, **arguments)

    def prepare_latents(
        self,
        video: torch.Tensor,
        batch_size: int,
        num_channels_latents: int,  # noqa: ARG002
        height: int,  # noqa: ARG002
        width: int,  # noqa: ARG002
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
        latents: None,  # noqa: ARG002
        timestep: torch.Tensor,
    ) -> torch.Tensor:
        own_bcfhw = video[:, :, self._extra * self.vae_scale_factor_temporal :]
        moments = self.vae.encode(own_bcfhw).latent_dist
        clean_bfchw = moments.sample(generator).to(dtype).transpose(1, 2) * self.vae_scaling_factor_image
        first = clean_bfchw[:, :1].expand(batch_size, self._extra, -1, -1, -1)
        padded_bfchw = torch.cat([first, clean_bfchw], dim=1)
        noise = randn_tensor(padded_bfchw.shape, generator=generator, device=device, dtype=dtype)
        noisy: torch.Tensor = self.scheduler.add_noise(padded_bfchw, noise, timestep)
        return noisy * float(self.scheduler.init_noise_sigma)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        frames: torch.Tensor = super().decode_latents(latents[:, self._extra :])
        return frames
