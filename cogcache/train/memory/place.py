"""Puts the transformer where the settings say, before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cogcache.config import TrainConfig
from cogcache.progress import say
from cogcache.train.data import Samples
from cogcache.train.memory.blocks import install
from cogcache.train.memory.choose import choose_measures, free_memory, uses_stock_blocks
from cogcache.train.memory.measures import Measures
from cogcache.train.memory.workload import workload_of

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["place_blocks"]


def place_blocks(
    config: TrainConfig, accelerator: Accelerator, transformer: Any, samples: Samples
) -> Measures | None:
    """Put a transformer, which holds what is trained, on the device under the measures that the settings ask for.

    Returns:
        The measures; None where the blocks stay diffusers' own.

    Raises:
        ConfigError: if the settings do not go together, or nothing fits the free memory.
    """
    from accelerate import DistributedType

    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if uses_stock_blocks(config, accelerator.device, deepspeed=deepspeed):
        if config.gradient_checkpointing is not False:
            transformer.enable_gradient_checkpointing()  # the non-reentrant kind
        transformer.to(accelerator.device)
        return None
    buckets = sorted({record.bucket for record in samples.records})
    load = workload_of(transformer, samples.variant, buckets, config.batch_size)
    told = say if accelerator.is_main_process else lambda _: None
    _, measures, _ = choose_measures(config, load, free_memory(accelerator.device), told)
    install(transformer, measures, accelerator.device)
    return measures
