"""Whether a LoRA belongs on a base model, decided from headers alone."""

from __future__ import annotations

import logging
from pathlib import Path

from cogcache.errors import LoraError, ModelError
from cogcache.lora import LoraHeader
from cogcache.tensorfile import read_tensor_header
from cogcache.variants import Variant, read_config

__all__ = ["check_lora_fits", "family_differences"]

_log = logging.getLogger(__name__)

# The facts that make another family. Default sizes and text length may differ between copies of one model.
_FAMILY = (
    "in_channels",
    "latent_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "patch_size",
    "patch_size_t",
    "positions",
    "ofs",
    "text_dim",
    "scaling_factor",
    "invert_scale_latents",
    "snr_shift_scale",
)


def check_lora_fits(
    lora: LoraHeader,
    variant: Variant,
    transformer: Path,
    model: str,
    *,
    alpha: float | None = None,
    flag: str = "--lora-alpha",
) -> None:
    """Refuse a LoRA of another family, or whose matrices do not fit the transformer's layers.

    Warns if neither the file nor ``alpha`` says its alpha.

    Raises:
        LoraError: listing the facts that differ, or naming the first layer that does not fit.
    """
    if lora.variant:
        _check_family(lora, lora.variant, variant, model)
    _check_shapes(lora, _transformer_shapes(transformer), model)
    if lora.alpha is None and alpha is None:
        _log.warning(
            "%s does not say its alpha; it is applied as alpha = rank = %d, as diffusers does. If it was trained "
            "with another (the reference trainer's default is 64 at rank 128: half as strong), give it as %s.",
            lora.path,
            lora.rank,
            flag,
        )


def family_differences(trained_on: Variant, variant: Variant) -> list[str]:
    """In words, the facts that make ``variant`` another family than ``trained_on``."""
    pairs = {name: (getattr(trained_on, name), getattr(variant, name)) for name in _FAMILY}
    return [f"{name} {was!r} is not {now!r}" for name, (was, now) in pairs.items() if was != now]


def _check_family(lora: LoraHeader, trained_on: Variant, variant: Variant, model: str) -> None:
    differing = family_differences(trained_on, variant)
    if differing:
        raise LoraError(
            f"{lora.path} was trained on another kind of model than {model}: {', '.join(differing)}.",
            f"It was trained on {lora.base_model}." if lora.base_model else "",
        )


def _transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the weights; where they have not been fetched yet, as the config has them."""
    shapes: dict[str, tuple[int, ...]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return _configured_shapes(folder)
    for file in files:
        try:
            shapes.update(read_tensor_header(file).shapes)
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read: {error}.") from None
    return shapes


def _configured_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    import torch
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    config = read_config(folder.parent, f"{folder.name}/config.json")
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}


def _check_shapes(lora: LoraHeader, layers: dict[str, tuple[int, ...]], model: str) -> None:
    """lora_A is [rank, in] and lora_B [out, rank], for a layer whose weight is [out, in]."""
    for name, shape in lora.shapes.items():
        layer, part = name.split(".lora_", 1)
        axis = {"A.weight": 1, "B.weight": 0}.get(part)
        if axis is None:
            continue
        weight = layers.get(f"{layer}.weight")
        if weight is None:
            raise LoraError(f"{lora.path} does not fit {model}, which has no layer {layer}.")
        if len(shape) != 2 or shape[axis] != weight[axis]:
            raise LoraError(
                f"{lora.path} does not fit {model}: at {layer} its lora_{part[0]} is {list(shape)}, "
                f"and the layer's weight {list(weight)}."
            )
