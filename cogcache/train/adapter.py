"""What LoRA a run trains: from its settings alone, or going on from a file (``--init-lora``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cogcache.config import TrainConfig
from cogcache.errors import ConfigError, LoraError
from cogcache.lora import LoraHeader, read_lora_header
from cogcache.lora.fit import check_lora_fits
from cogcache.lora.targets import RankPattern, name_targets, parse_rank_pattern, pick_layers, plain_targets
from cogcache.lora.weights import layer_alphas, lora_settings, read_lora
from cogcache.variants import Variant

__all__ = ["continue_from", "load_init_lora", "peft_config"]


def continue_from(config: TrainConfig, variant: Variant, root: Path, model: str) -> TrainConfig:
    """Fill the LoRA settings that were not given from ``--init-lora``; without it, ``config`` as it is.

    A file that does not say its alpha takes ``--alpha`` where that is given, else alpha = rank, with a warning.

    Raises:
        ConfigError: if a setting was given that the file contradicts.
        LoraError: if the file cannot be read or does not fit the model.
    """
    if config.init_lora is None:
        return config
    header = read_lora_header(config.init_lora)
    alpha = _alpha_needed(config, header)
    check_lora_fits(header, variant, root / "transformer", model, alpha=alpha, flag="--alpha")
    found = _settings_of(header, alpha, variant)
    given = config.model_fields_set
    for name in ("rank", "alpha", "dora", "rslora"):
        if name in given and getattr(config, name) != found[name]:
            raise ConfigError(
                f"--init-lora {str(header.path)!r} has {name} {found[name]}, and --{name} says "
                f"{getattr(config, name)}.",
                f"Leave --{name} out: it comes from the file.",
            )
    return config.model_copy(update={name: value for name, value in found.items() if name not in given})


def _alpha_needed(config: TrainConfig, header: LoraHeader) -> float | None:
    """``--alpha`` where it was given and the file does not say its own."""
    return config.alpha if header.alpha is None and "alpha" in config.model_fields_set else None


def _settings_of(header: LoraHeader, alpha: float | None, variant: Variant) -> dict[str, Any]:
    settings = lora_settings(header, alpha)
    common = (settings["r"], float(settings["lora_alpha"]))
    layers = layer_alphas(header, settings)
    own = [
        str(RankPattern("^" + layer.replace(".", r"\."), *facts))
        for layer, facts in layers.items()
        if facts != common
    ]
    return {
        "rank": common[0],
        "alpha": common[1],
        "dora": settings.get("use_dora", False),
        "rslora": settings.get("use_rslora", False),
        "target_modules": name_targets(list(layers), variant.num_layers),
        "rank_pattern": own,
    }


def peft_config(transformer: nn.Module, config: TrainConfig) -> Any:
    """The PEFT ``LoraConfig`` of a run.

    Raises:
        ConfigError: naming the target modules or rank patterns that match no layer.
    """
    from peft import LoraConfig

    layers = _target_layers(transformer, config.target_modules)
    patterns = [parse_rank_pattern(text) for text in config.rank_pattern]
    idle = [one for one in patterns if not any(one.fits(layer) for layer in layers)]
    if idle:
        raise ConfigError(f"--rank-pattern {str(idle[0])!r} matches none of the layers that get a LoRA.")
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=plain_targets(config.target_modules) if _by_name(config) else layers,
        rank_pattern={one.pattern: one.rank for one in patterns},
        alpha_pattern={one.pattern: _alpha(one, config) for one in patterns},
        use_dora=config.dora,
        use_rslora=config.rslora,
    )


def _by_name(config: TrainConfig) -> bool:
    return not any(target.startswith("re:") for target in config.target_modules)


def _alpha(pattern: RankPattern, config: TrainConfig) -> float:
    """Strength like that of the other layers: alpha / rank, or with rsLoRA alpha / sqrt(rank)."""
    if pattern.alpha is not None:
        return pattern.alpha
    share = pattern.rank / config.rank
    return config.alpha * (share**0.5 if config.rslora else share)


def _target_layers(transformer: nn.Module, targets: list[str]) -> list[str]:
    """Names of the linear layers that get a LoRA."""
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    picked = {target: pick_layers(target, layers) for target in plain_targets(targets)}
    unknown = [target for target, found in picked.items() if not found]
    if unknown:
        endings = sorted(
            {name.split(".", 2)[-1] for name in layers if name.startswith("transformer_blocks.")}
        )
        raise ConfigError(
            f"no layer of this model is named {', '.join(map(repr, unknown))}.",
            f"Layers of a block: {', '.join(endings)}; the last parts of a name are enough (to_q).",
        )
    chosen = {layer for found in picked.values() for layer in found}
    return [layer for layer in layers if layer in chosen]


def load_init_lora(transformer: nn.Module, config: TrainConfig) -> None:
    """Put the weights of ``--init-lora`` into the LoRA of ``transformer``, in float32.

    Raises:
        LoraError: if it has other layers or other ranks than this run.
    """
    if config.init_lora is None:
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    header = read_lora_header(config.init_lora)
    tensors = read_lora(header).tensors
    wanted = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(transformer).items()}
    differing = sorted(wanted.items() ^ {(name, tuple(value.shape)) for name, value in tensors.items()})
    if differing:
        name, _shape = differing[0]
        raise LoraError(
            f"{header.path} does not have the layers and ranks of this run: they differ at {name}.",
            "Leave --target-modules and --rank-pattern out: they come from the file.",
        )
    set_peft_model_state_dict(transformer, {name: value.to(torch.float32) for name, value in tensors.items()})
