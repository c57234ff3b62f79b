"""Decides how the transformer's blocks run, before it is loaded, and puts it there."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cogcache.config import TrainConfig
from cogcache.progress import say
from cogcache.train.data import Samples
from cogcache.train.memory.blocks import home_of, install
from cogcache.train.memory.choose import (
    Variants,
    candidates,
    choose,
    forecasts,
    free_memory,
    uses_stock_blocks,
)
from cogcache.train.memory.estimate import Need
from cogcache.train.memory.forecast import (
    Forecast,
    Job,
    compiles,
    host_parts,
    shortfall,
    unloaded_transformer,
)
from cogcache.train.memory.gpus import find_card, measured_rates
from cogcache.train.memory.measures import Measures
from cogcache.train.memory.stock import compile_blocks
from cogcache.train.model import load_transformer
from cogcache.variants import read_config

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Placement", "load_blocks", "place_blocks", "plan_blocks"]


@dataclass(frozen=True)
class Placement:
    """How the blocks will run.

    Attributes:
        measures: None where they stay diffusers' own.
        forecast: What a step should take; None where there is no GPU.
        kept_bytes: Size of the largest tensor that is kept from the forward to the backward pass.
        compiled: Whether blocks are compiled.
    """

    measures: Measures | None
    forecast: Forecast | None = None
    kept_bytes: int = 0
    compiled: bool = False


def plan_blocks(
    config: TrainConfig, accelerator: Accelerator, root: Path, samples: Samples, dtype: torch.dtype
) -> Placement:
    """Decide before anything is loaded. On a GPU this takes as long as importing diffusers.

    Args:
        root: The checkpoint's folder, of which the transformer's config is read.
        dtype: What the base computes in.

    Raises:
        ConfigError: if the settings do not go together.
        NothingFitsError: if nothing fits the free memory.
    """
    from accelerate import DistributedType

    device = accelerator.device
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    stock = uses_stock_blocks(config, device, deepspeed=deepspeed)
    tiers: list[tuple[str, Variants]] = [("plain", [None])] if stock else candidates(config)
    if device.type != "cuda" or deepspeed:
        measures = tiers[0][1][0]
        return Placement(measures, compiled=compiles(measures, config))
    transformer = unloaded_transformer(read_config(root, "transformer/config.json"), config, dtype)
    clips = Counter(record.bucket for record in samples.records)
    job = Job(transformer, samples.variant, clips, config, dtype, accelerator.num_processes)
    card = find_card(torch.cuda.get_device_name(device))
    rates = card.rates if card else measured_rates(device)
    free = _free(accelerator)
    forecast = choose(forecasts(job, tiers, rates, free), free, config)
    if accelerator.is_main_process:
        _tell(forecast, free)
    return Placement(forecast.measures, forecast, job.unit, forecast.compiled)


def _free(accelerator: Accelerator) -> Need:
    """What each process may count on: the least of any GPU, and its share of the host, so that all decide alike."""
    free = free_memory(accelerator.device)
    if accelerator.num_processes == 1:
        return free
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    mine = torch.tensor([[free.device, free.host // neighbours]], device=accelerator.device)
    device, host = accelerator.gather(mine).amin(dim=0).tolist()
    return Need(device, host)


def _tell(forecast: Forecast, free: Need) -> None:
    memory = forecast.memory
    needed = sum(host_parts(forecast, free).values())
    host = f" and {needed / 2**30:.1f} GiB of host memory" if needed else ""
    pace = f", {forecast.mean_s:.2f} s a step" if forecast.mean_s else ""
    say(
        f"Memory: tier {forecast.tier}, about {memory.device / 2**30:.1f} of {free.device / 2**30:.1f} GiB free"
        f"{host}{pace}."
    )
    if forecast.given_up:
        say(f"NOTICE: host memory is short, so {forecast.given_up} (docs/memory.md).")
    if missing := shortfall(memory, free):
        say(f"NOTICE: that may not fit: it needs {missing}.")


def load_blocks(
    placement: Placement, config: TrainConfig, root: Path, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Load the frozen transformer to where :func:`place_blocks` takes it from.

    Raises:
        ModelError: if its weights are missing or damaged.
    """
    how = placement.measures
    if how is not None and how.storage == "int8":
        return load_transformer(root, dtype, device, int8_home=home_of(how, device))
    stay = how is not None and how.weights == "host"
    stay |= config.dora  # whose first magnitudes are norms of the weights, and shall not depend on the device
    return load_transformer(root, dtype, None if stay else device)


def place_blocks(
    placement: Placement, config: TrainConfig, transformer: Any, device: torch.device
) -> Measures | None:
    """Put a transformer, which holds what is trained, on ``device``, and let its blocks run as decided.

    Returns:
        The measures; None where the blocks stay diffusers' own.
    """
    if placement.measures is not None:
        install(transformer, placement.measures, device, placement.kept_bytes)
        return placement.measures
    if config.gradient_checkpointing is not False:
        transformer.enable_gradient_checkpointing()  # the non-reentrant kind
    if placement.compiled:
        compile_blocks(transformer)
    transformer.to(device)
    return None
