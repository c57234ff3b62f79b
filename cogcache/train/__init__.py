"""From shards to a LoRA: transformer and LoRA only, no VAE, no text encoder, no video reader.

A sample's way: shard -> ``data`` (its draws) -> batch -> ``objective`` (noise, positions, task, loss) ->
``loop`` (gradient, step) -> ``checkpoints`` and the LoRA file.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogcache.config import TrainConfig
    from cogcache.train.stage import TrainResult

__all__ = ["train"]


def train(config: TrainConfig, *, begun: float = 0.0) -> TrainResult:
    """Train a LoRA on a cache. See :func:`cogcache.train.stage.train`.

    Args:
        begun: Seconds that the process has run already, to be told as part of the start.
    """
    started = time.perf_counter()
    from cogcache.train.stage import train as run

    return run(config, begun=begun + time.perf_counter() - started)
