"""From ``--memory`` and the single flags to measures; ``auto`` takes the fastest tier that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch

from cogcache.config import TrainConfig
from cogcache.errors import ConfigError
from cogcache.train.memory.estimate import Estimate, Need, estimate
from cogcache.train.memory.measures import TIERS, Measures, Tier
from cogcache.train.memory.workload import Workload

__all__ = ["Choice", "choose_measures", "free_memory", "uses_stock_blocks"]

Choice = tuple[str, Measures, Estimate]
"""Name of the tier, its measures with the single flags applied, and what they should need."""

_DEVICE_SHARE, _HOST_SHARE = 0.94, 0.85
"""What of the free memory ``auto`` plans with: the allocator's gaps and other programs need the rest."""


def uses_stock_blocks(config: TrainConfig, device: torch.device, *, deepspeed: bool) -> bool:
    """Whether the blocks run as diffusers has them, with or without its checkpointing: ``--memory plain``.

    ``auto`` means that on a CPU, where there is nothing to gain, and for what the measures do not know: all weights
    trained, LoRA dropout, DeepSpeed.

    Raises:
        ConfigError: if a tier was asked for in such a case, or single measures were given for plain blocks.
    """
    why = _unknown(config, deepspeed)
    if config.memory not in ("auto", "plain") and why:
        raise ConfigError(f"--memory {config.memory} does not work with {why}.", "Use --memory plain.")
    plain = config.memory == "plain" or (config.memory == "auto" and bool(why or device.type == "cpu"))
    given = [name for name in _FLAGS if getattr(config, name) is not None]
    if plain and given:
        flag = given[0].replace("_", "-")
        raise ConfigError(
            f"--{flag} is a measure of the memory tiers, and the blocks run plainly here.",
            "Give a tier, as --memory small, or leave the flag out.",
        )
    return plain


_FLAGS = ("keep_attention", "keep_inputs", "base_weights", "optimizer_state", "compile")


def _unknown(config: TrainConfig, deepspeed: bool) -> str:
    if config.training_type == "full":
        return "--training-type full"
    if config.lora_dropout:
        return "--lora-dropout"
    return "DeepSpeed" if deepspeed else ""


def choose_measures(
    config: TrainConfig, load: Workload, free: Need, say: Callable[[str], None] = lambda _: None
) -> Choice:
    """The measures to train with.

    Args:
        free: Bytes that are free on the device and on the host.
        say: Told which tier ``auto`` took, and why.

    Raises:
        ConfigError: if ``auto`` finds no tier that fits; lists what each would need.
    """
    tiers = get_args(Tier) if config.memory == "auto" else (config.memory,)
    choices = []
    for tier in tiers:
        measures = _with_flags(TIERS[tier], config)
        choices.append((tier, measures, estimate(load, measures)))
    if config.memory != "auto":
        return choices[0]
    for choice in choices:
        if _fits(choice[2], free):
            say(
                f"Memory: tier {choice[0]}, about {choice[2].device / 2**30:.1f} of {_gib(free.device)} free."
            )
            return choice
    rows = ", ".join(
        f"{tier} {_gib(need.device)} and {_gib(need.host)} of host memory" for tier, _, need in choices
    )
    raise ConfigError(
        f"no memory tier fits into {_gib(free.device)} of GPU memory and {_gib(free.host)} of host memory "
        f"that are free. Needed: {rows}.",
        "Use fewer frames, a smaller size or a lower --rank; or give the tier by --memory to try all the same.",
    )


def _fits(need: Estimate, free: Need) -> bool:
    return need.device <= _DEVICE_SHARE * free.device and need.host <= _HOST_SHARE * free.host


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _with_flags(measures: Measures, config: TrainConfig) -> Measures:
    changes: dict[str, Any] = {}
    if config.gradient_checkpointing is not None:
        changes["recompute"] = config.gradient_checkpointing
    if config.keep_attention is not None:
        changes["attention"] = None if config.keep_attention == "no" else config.keep_attention
    for name, flag in (
        ("inputs", "keep_inputs"),
        ("weights", "base_weights"),
        ("optimizer", "optimizer_state"),
    ):
        if getattr(config, flag) is not None:
            changes[name] = getattr(config, flag)
    if config.compile is not None:
        changes["compile"] = config.compile
    return replace(measures, **changes)


def free_memory(device: torch.device) -> Need:
    """Bytes free on the device and on the host."""
    import psutil

    host = int(psutil.virtual_memory().available)
    if device.type != "cuda":
        return Need(host, host)
    return Need(int(torch.cuda.mem_get_info(device)[0]), host)
