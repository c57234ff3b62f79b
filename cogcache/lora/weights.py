"""A LoRA's tensors and settings as PEFT and diffusers take them, from any format that can be read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cogcache.errors import ConfigError, LoraError
from cogcache.lora import LoraHeader
from cogcache.lora.foreign import alpha_of_layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LoraWeights", "layer_alphas", "lora_settings", "read_lora"]


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA in memory.

    Attributes:
        header: What its file says.
        tensors: By canonical name (``<module>.lora_A.weight``), on the CPU, in the dtype of the file.
        settings: Keyword arguments of a PEFT ``LoraConfig`` that gives the trained strength.
    """

    header: LoraHeader
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    def folded(self) -> LoraWeights:
        """The same function with alpha = rank in every layer: lora_B times its strength, in its own dtype.

        For tools that take alpha = rank whatever a file says. The product is computed in float32.
        """
        strengths = {
            layer: strength(rank, alpha, rslora=bool(self.settings.get("use_rslora")))
            for layer, (rank, alpha) in layer_alphas(self.header, self.settings).items()
        }
        tensors = dict(self.tensors)
        for layer, factor in strengths.items():
            for name in (f"{layer}.lora_B.weight", f"{layer}.lora_B.bias"):
                if name in tensors:
                    tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
        ranks = {layer: float(rank) for layer, rank in layer_ranks(self.header).items()}
        settings = {key: value for key, value in self.settings.items() if key != "use_rslora"}
        return LoraWeights(self.header, tensors, {**settings, **_alpha_settings(ranks)})


def strength(rank: int, alpha: float, *, rslora: bool) -> float:
    """Factor on lora_B lora_A: alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def read_lora(header: LoraHeader, alpha: float | None = None) -> LoraWeights:
    """Read the tensors; nothing is unpickled.

    Args:
        alpha: For files that do not say theirs; without it alpha = rank is taken, as diffusers does.

    Raises:
        ConfigError: if ``alpha`` is given and the file says its own.
        LoraError: if the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = lora_settings(header, alpha)
    try:
        stored = load_file(header.file)
    except (OSError, SafetensorError) as error:
        raise LoraError(f"{header.file} cannot be read: {error}") from None
    return LoraWeights(header, {name: stored[raw] for name, raw in header.names.items()}, settings)


def lora_settings(header: LoraHeader, alpha: float | None = None) -> dict[str, Any]:
    """Keyword arguments of a ``LoraConfig``: layers and ranks are those of the tensors, alpha as read or given.

    Raises:
        ConfigError: if ``alpha`` is given and the file says its own.
    """
    if alpha is not None and header.alpha is not None:
        raise ConfigError(
            f"{header.path} says its alpha ({header.alpha:g}), so none can be given.",
            "To change its strength use --lora-scale.",
        )
    ranks = layer_ranks(header)
    common = _most_common(ranks.values())
    settings: dict[str, Any] = {
        "r": common,
        "target_modules": sorted(ranks),
        "rank_pattern": {_exactly(layer): rank for layer, rank in ranks.items() if rank != common},
        **_alpha_settings(_alphas(header, ranks, alpha)),
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in header.shapes),
        "use_rslora": bool(header.adapter.get("use_rslora")),
        "lora_bias": any(name.endswith("lora_B.bias") for name in header.shapes),
    }
    kept = ("r", "lora_alpha", "target_modules")
    return {key: value for key, value in settings.items() if value or key in kept}


def layer_ranks(header: LoraHeader) -> dict[str, int]:
    """Rank of each layer, by its name."""
    ending = ".lora_A.weight"
    return {name.removesuffix(ending): s[0] for name, s in header.shapes.items() if name.endswith(ending)}


def layer_alphas(header: LoraHeader, settings: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each layer under these settings."""
    patterns = settings.get("alpha_pattern", {})
    return {
        layer: (rank, float(alpha_of_layer(layer, patterns, settings["lora_alpha"])))
        for layer, rank in layer_ranks(header).items()
    }


def _alphas(header: LoraHeader, ranks: Mapping[str, int], given: float | None) -> dict[str, float]:
    if given is not None:
        return dict.fromkeys(ranks, given)
    if header.alpha is None:
        return {layer: float(rank) for layer, rank in ranks.items()}
    patterns = header.adapter.get("alpha_pattern") or {}
    return {layer: float(alpha_of_layer(layer, patterns, header.alpha)) for layer in ranks}


def _alpha_settings(alphas: Mapping[str, float]) -> dict[str, Any]:
    common = _most_common(alphas.values())
    pattern = {_exactly(layer): alpha for layer, alpha in alphas.items() if alpha != common}
    return {"lora_alpha": common, "alpha_pattern": pattern}


def _exactly(layer: str) -> str:
    """A PEFT pattern for this layer alone."""
    return "^" + re.escape(layer)


def _most_common(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]
