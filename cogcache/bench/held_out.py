"""The loss of single clips with fixed noise, of a base model with and without a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogcache.cache.format import SampleRecord
    from cogcache.cache.reader import CacheReader

__all__ = ["held_out_losses", "stock_transformer"]


def stock_transformer(model: Path, lora: Path | None = None, scale: float = 1.0) -> Any:
    """The transformer in float32 as the stock pipeline has it after ``load_lora_weights``."""
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        model, vae=None, text_encoder=None, tokenizer=None, dtype=torch.float32, use_safetensors=True
    )
    if lora is not None:
        pipe.load_lora_weights(lora, adapter_name="lora")
        pipe.set_adapters(["lora"], [scale])
    return pipe.transformer


def held_out_losses(
    reader: CacheReader, model: Path, transformer: Any, records: Sequence[SampleRecord], device: str = "cpu"
) -> dict[str, list[float]]:
    """Source -> losses at the fixed timesteps of validation, each with the noise that is that clip's and timestep's.

    Args:
        model: Folder of the base model.
        transformer: As :func:`stock_transformer` gives it.
        records: Clips of ``reader``.
    """
    import torch

    from cogcache.config import TrainConfig
    from cogcache.geometry import Size
    from cogcache.train.devices import open_accelerator
    from cogcache.train.model import load_scheduler
    from cogcache.train.signals import StopRequest
    from cogcache.train.validation import Validator, VideoShape
    from cogcache.variants import read_variant

    config = TrainConfig(shards=str(reader.root), device=device, workers=0, dtype="float32")
    accelerator = open_accelerator(config)
    validator = Validator(
        config,
        accelerator,
        transformer.to(accelerator.device),
        load_scheduler(model),
        reader,
        records,
        variant=read_variant(model),
        root=model,
        output=Path(),
        dtype=torch.float32,
        shape=VideoShape(1, Size(8, 8), 8.0),
    )
    found = validator.run(0, StopRequest()).losses
    return {row.source: [losses[n] for losses in found.values()] for n, row in enumerate(records)}
