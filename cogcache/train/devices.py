"""The device, the processes, and how gradients meet: what Accelerate does for us."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from cogcache.allocator_settings import set_up_allocators
from cogcache.config import TrainConfig
from cogcache.errors import ConfigError
from cogcache.models import pick_device

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["open_accelerator", "product_ceiling", "set_matmul_precision"]

_BFLOAT16 = (8, 0)
"""CUDA capability from which on products in bfloat16 are not emulated."""
_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others. One with nothing to sample waits while another samples a whole video."""


def open_accelerator(config: TrainConfig) -> Accelerator:
    """Join the processes of ``accelerate launch``, or be the only one.

    Mixed precision stays off: the frozen base runs in its own dtype as in the pipelines, without autocast,
    and PEFT casts at the border to the float32 LoRA.

    Raises:
        ConfigError: if the device is not there, or the launch asks for what is not supported.
    """
    from accelerate import Accelerator, DistributedType

    device = pick_device(config.device)
    if ":" in config.device:
        raise ConfigError(
            f"train takes --device auto, cpu or cuda, not {config.device}.",
            f"Choose the GPU by CUDA_VISIBLE_DEVICES={config.device.partition(':')[2]}.",
        )
    set_up_allocators()
    on_cpu, deepspeed = device.type == "cpu", _launched_with_deepspeed()
    if deepspeed and on_cpu:
        _deepspeed_on_cpu()
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,  # with it, Accelerate forgets about DeepSpeed without a word
        mixed_precision="no",
        gradient_accumulation_steps=1,
        kwargs_handlers=_handlers(config, gloo=deepspeed and on_cpu),
    )
    supported = (
        DistributedType.NO,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_CPU,
        DistributedType.DEEPSPEED,
    )
    if accelerator.distributed_type not in supported:
        raise ConfigError(
            f"training under {accelerator.distributed_type.value} is not supported.",
            "Launch with plain data parallelism (accelerate launch --multi_gpu) or with DeepSpeed.",
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from cogcache.train.zero import check_deepspeed

        check_deepspeed(accelerator.deepspeed_plugin.deepspeed_config)
    return accelerator


def _launched_with_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _deepspeed_on_cpu() -> None:
    """Let DeepSpeed run without a GPU, and without compiling an extension for exchange through shared memory:
    that takes a compiler and a minute, and processes that have just built it may not end. Gloo does without.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _handlers(config: TrainConfig, *, gloo: bool) -> list[Any]:
    from accelerate import DistributedDataParallelKwargs, InitProcessGroupKwargs

    parallel = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    settings: dict[str, Any] = {"backend": "gloo"} if gloo else {}
    if config.validate_every:
        settings["timeout"] = _PATIENCE
    return [parallel, InitProcessGroupKwargs(**settings)] if settings else [parallel]


def set_matmul_precision(device: torch.device, dtype: torch.dtype) -> None:
    """Let the float32 LoRA's products use TF32 on a GPU, unless the whole model was asked for in float32."""
    if device.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")


def product_ceiling(device: torch.device) -> float | None:
    """Operations a second that a GPU reaches in bfloat16 matrix products, measured in a fifth of a second.

    None where there is no GPU, or one that only emulates such products. To be called before
    anything is on the device: it takes 400 MB for a moment, which no peak counts.
    """
    if device.type != "cuda":
        return None
    from cogcache.train.memory.gpus import product_rate

    with torch.cuda.device(device):
        if torch.cuda.get_device_capability(device) < _BFLOAT16:
            return None
        rate = product_rate(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return rate
