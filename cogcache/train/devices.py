"""The device, the processes, and how gradients meet: what Accelerate does for us."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cogcache.config import TrainConfig
from cogcache.errors import ConfigError
from cogcache.models import pick_device

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["open_accelerator", "set_matmul_precision"]


def open_accelerator(config: TrainConfig) -> Accelerator:
    """Join the processes of ``accelerate launch``, or be the only one.

    Mixed precision stays off: the frozen base runs in its own dtype as in the pipelines, without autocast,
    and PEFT casts at the border to the float32 LoRA.

    Raises:
        ConfigError: if the device is not there, or the launch asks for what is not supported.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType

    device = pick_device(config.device)
    if ":" in config.device:
        raise ConfigError(
            f"train takes --device auto, cpu or cuda, not {config.device}.",
            f"Choose the GPU by CUDA_VISIBLE_DEVICES={config.device.partition(':')[2]}.",
        )
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        gradient_accumulation_steps=1,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    supported = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in supported:
        raise ConfigError(
            f"training under {accelerator.distributed_type.value} is not supported yet.",
            "Launch with plain data parallelism: accelerate launch --multi_gpu.",
        )
    return accelerator


def set_matmul_precision(device: torch.device, dtype: torch.dtype) -> None:
    """Let the float32 LoRA's products use TF32 on a GPU, unless the whole model was asked for in float32."""
    if device.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")
