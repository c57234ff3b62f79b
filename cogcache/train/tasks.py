"""What a task puts into the transformer besides the noisy video: a small strategy for each.

Text-to-video puts nothing. Image-to-video concatenates the first frame's latent on the channel axis,
[noisy video, image], and tells models with an ``ofs`` embedding the constant 2.0, as
``CogVideoXImageToVideoPipeline`` does.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cogcache.variants import Variant

__all__ = ["ImageToVideo", "Task", "TextToVideo", "image_scale", "task_for"]

OFS = 2.0
"""The constant that ``CogVideoXImageToVideoPipeline`` gives to models with ``ofs_embed_dim``."""


class Task(Protocol):
    """What differs between tasks, on the model's side and on the data's."""

    def model_input(
        self, noisy_bpchw: Tensor, image_latents_bcfhw: Tensor | None, variant: Variant, dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, Any]]:
        """``hidden_states`` in ``dtype`` and further keyword arguments of the transformer.

        Args:
            noisy_bpchw: Noisy video latents, float32, padding included.
            image_latents_bcfhw: Unscaled image latents [B, C, 1, H, W], or None where the task takes none.

        Raises:
            ValueError: if the image latents are missing or not wanted.
        """
        ...

    @property
    def needs_image(self) -> bool:
        """Whether each sample must come with a bank of image latents."""
        ...


class TextToVideo:
    """Only the noisy video."""

    needs_image = False

    def model_input(
        self, noisy_bpchw: Tensor, image_latents_bcfhw: Tensor | None, variant: Variant, dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, Any]]:
        """See :class:`Task`."""
        if image_latents_bcfhw is not None:
            raise ValueError("text-to-video takes no image latents")
        return noisy_bpchw.to(dtype), _ofs(variant, noisy_bpchw, dtype)


class ImageToVideo:
    """The noisy video, and the image latent at the first of the padded frames with zeros behind it."""

    needs_image = True

    def model_input(
        self, noisy_bpchw: Tensor, image_latents_bcfhw: Tensor | None, variant: Variant, dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, Any]]:
        """See :class:`Task`."""
        if image_latents_bcfhw is None:
            raise ValueError("image-to-video needs image latents")
        condition_bpchw = torch.zeros_like(noisy_bpchw)
        condition_bpchw[:, :1] = (image_scale(variant) * image_latents_bcfhw.float()).transpose(1, 2)
        hidden = torch.cat([noisy_bpchw.to(dtype), condition_bpchw.to(dtype)], dim=2)
        return hidden, _ofs(variant, noisy_bpchw, dtype)


def image_scale(variant: Variant) -> float:
    """Factor from unscaled to conditioning image latents, by the pipeline's rule.

    With ``invert_scale_latents`` the pipeline *divides* by the scaling factor. (The reference trainer
    multiplies, so its training and inference differ by about 2x.)
    """
    return 1 / variant.scaling_factor if variant.invert_scale_latents else variant.scaling_factor


def _ofs(variant: Variant, like: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    return {"ofs": like.new_full((1,), OFS, dtype=dtype)} if variant.ofs else {}


def task_for(variant: Variant) -> Task:
    """The strategy of a checkpoint's task."""
    return ImageToVideo() if variant.task == "i2v" else TextToVideo()
