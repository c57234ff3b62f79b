"""From ``--memory`` and the single flags to measures; ``auto`` takes the fastest tier that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias, get_args

import torch

from cogcache.config import TrainConfig
from cogcache.errors import ConfigError, NothingFitsError
from cogcache.train.memory.estimate import Need
from cogcache.train.memory.forecast import Forecast, Job, fits_host, shortfall
from cogcache.train.memory.measures import TIERS, TINY, Measures, Tier
from cogcache.train.memory.speed import Rates
from cogcache.train.memory.table import tier_table

__all__ = ["Variants", "candidates", "choose", "forecasts", "free_memory", "uses_stock_blocks"]


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
    given = [name for name in _TIERS_ALONE if getattr(config, name) is not None]
    if plain and given:
        flag = given[0].replace("_", "-")
        raise ConfigError(
            f"--{flag} is a measure of the memory tiers, and the blocks run plainly here.",
            "Give a tier, as --memory small, or leave the flag out.",
        )
    return plain


_TIERS_ALONE = (
    "keep_attention",
    "keep_inputs",
    "base_weights",
    "base_storage",
    "in_parts",
    "optimizer_state",
)


def _unknown(config: TrainConfig, deepspeed: bool) -> str:
    if config.training_type == "full":
        return "--training-type full"
    if config.lora_dropout:
        return "--lora-dropout"
    return "DeepSpeed" if deepspeed else ""


Variants: TypeAlias = Sequence[Measures | None]


def candidates(config: TrainConfig) -> list[tuple[str, Variants]]:
    """The tiers to choose from, with the single flags applied: for ``auto`` all that go with them, the fastest first.

    Each with its variants, for hosts of ever less memory.

    Raises:
        ConfigError: if no tier goes with the flags.
    """
    found: list[tuple[str, Variants]] = [
        (tier, variants)
        for tier in get_args(Tier)
        if config.memory in ("auto", tier) and (variants := _variants(tier, config))
    ]
    if not found:
        raise ConfigError(
            f"--memory {config.memory} brings weights to the GPU block by block, so blocks must be computed again.",
            "Leave --no-gradient-checkpointing out, or use --memory fast and no --base-storage int8.",
        )
    return found


def _variants(tier: Tier, config: TrainConfig) -> Variants:
    variants = TINY if tier == "tiny" else (TIERS[tier],)
    found = dict.fromkeys(_with_flags(measures, config) for measures in variants)
    whole = config.dora  # needs the norms of whole weights
    return [
        measures
        for measures in found
        if (measures.recompute or not measures.streams) and not (whole and measures.storage == "int8")
    ]


def forecasts(
    job: Job, tiers: Sequence[tuple[str, Variants]], rates: Rates | None, free: Need
) -> list[Forecast]:
    """What each tier takes in the first of its variants that fits the host's memory, else in the last."""
    found = []
    for tier, variants in tiers:
        every = [job.forecast(tier, measures, rates) for measures in variants]
        taken = next((one for one in every if fits_host(one.memory, free)), every[-1])
        found.append(replace(taken, given_up=_given_up(variants[0], taken.measures)))
    return found


def _given_up(first: Measures | None, taken: Measures | None) -> str:
    """What one variant does not do that the first does, in words."""
    if first is None or taken is None:
        return ""
    texts = []
    if first.attention is not None and taken.attention is None:
        texts.append("attention is computed again")
    if taken.storage != first.storage:
        texts.append("the base's matrices are kept in 8 bits, which moves gradients by about a hundredth")
    return " and ".join(texts)


def choose(forecasts: Sequence[Forecast], free: Need, config: TrainConfig) -> Forecast:
    """The first that fits; a tier that was named, whether it fits or not.

    Args:
        forecasts: Of the tiers to choose from; one if the tier was named, or if no other can be had.
        free: Bytes that are free on the device and on the host.

    Raises:
        NothingFitsError: if none fits, with a table of what each would need.
    """
    if config.memory != "auto":
        return forecasts[0]
    for forecast in forecasts:
        if not shortfall(forecast.memory, free):
            return forecast
    why = _unknown(config, deepspeed=False)
    nothing = (
        f"with {why} there is only --memory plain, and it does not fit" if why else "no memory tier fits"
    )
    raise NothingFitsError(
        f"{nothing} into {_gib(free.device)} of GPU memory and {_gib(free.host)} of host memory that are free."
        f"\n\n{tier_table(forecasts, free)}\n",
        _advice(config),
    )


def _advice(config: TrainConfig) -> str:
    less, tier = "fewer frames, a smaller size, --batch-size or --rank", "the tier by --memory"
    if config.training_type == "full":
        less, tier = "fewer frames, a smaller size, --batch-size or --training-type lora", "--memory plain"
    elif config.lora_dropout:
        less, tier = f"no --lora-dropout, so that smaller tiers can be had, {less}", "--memory plain"
    return f"Use {less} ('cogcache plan' tells what they take); or give {tier} to try all the same."


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
        ("storage", "base_storage"),
        ("in_parts", "in_parts"),
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
