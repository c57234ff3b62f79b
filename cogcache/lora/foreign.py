"""What other tools write: file places, key formats and where alpha hides.

Read are, beside this project's own files:

- ``pytorch_lora_weights.safetensors`` of the CogVideo reference trainer and of diffusers' CogVideoX example
  (``transformer.<module>.lora_A.weight``; alpha is not stored) and of finetrainers (the same, with a
  ``lora_config`` text in the metadata that holds alpha, which diffusers does not look at);
- PEFT's own folders: ``adapter_model.safetensors`` (``base_model.model.<module>.lora_A.weight``) with
  ``adapter_config.json``;
- files with an alpha tensor per layer: ``<module>.alpha`` beside ``lora_down`` and ``lora_up``, with dots or, as
  kohya's scripts and CogVideoX-Fun write them, underscores (``lora_unet__transformer_blocks_0_attn1_to_q``).

The canonical names are those PEFT gives for the transformer alone: ``<module>.lora_A.weight``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "alpha_of_layer",
    "canonical_name",
    "canonical_names",
    "check_pattern",
    "find_weights",
    "metadata_adapter",
]

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
_FINETRAINERS_KEY = "lora_config"
_PREFIX = "transformer."
_LONGEST_PATTERN, _MOST_REPEATS = 300, 3

_UNDERSCORED = re.compile(r"lora_(?:unet|transformer)_+transformer_blocks_(\d+)_(\w+)\.(.+)")
_BLOCK_LAYERS = {
    name.replace(".", "_"): name
    for name in (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2",
        "norm1.linear", "norm2.linear",
    )
}  # fmt: skip
_PARTS = {
    "lora_A.weight": "lora_A.weight",
    "lora_A.default.weight": "lora_A.weight",
    "lora_down.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "lora_B.default.weight": "lora_B.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_B.bias": "lora_B.bias",
    "lora_B.default.bias": "lora_B.bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "lora_magnitude_vector.default.weight": "lora_magnitude_vector",
    "alpha": "alpha",
}


def find_weights(path: Path, names: Sequence[str]) -> tuple[Path, Path | None]:
    """The weights file that ``path`` (file or folder) means, and its ``adapter_config.json`` if it has one.

    In a folder, ``names`` are tried in order, after PEFT's own.
    """
    if path.is_dir():
        found = [path / name for name in (PEFT_WEIGHTS, *names) if (path / name).is_file()]
        path = found[0] if found else path / next(iter(names), PEFT_WEIGHTS)
    config = path.with_name(PEFT_CONFIG)
    return path, config if path.name == PEFT_WEIGHTS and config.is_file() else None


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Canonical name of every tensor, by the name in the file.

    Raises:
        ValueError: naming the first tensor that is not part of a transformer's LoRA, or that means the same as
            another.
    """
    known: dict[str, str] = {}
    for name in names:
        canonical = canonical_name(name)
        if canonical is None:
            raise ValueError(f"weights that are not a transformer's LoRA: {name[:100]}")
        if canonical in known.values():
            raise ValueError(f"the weights {canonical[:100]} twice")
        known[name] = canonical
    return known


def canonical_name(name: str) -> str | None:
    """``transformer.x.lora_down.weight`` -> ``x.lora_A.weight``; ``None`` if it is no LoRA weight."""
    underscored = _UNDERSCORED.fullmatch(name)
    if underscored:
        number, layer, part = underscored.groups()
        if layer not in _BLOCK_LAYERS or part not in _PARTS:
            return None
        return f"transformer_blocks.{number}.{_BLOCK_LAYERS[layer]}.{_PARTS[part]}"
    if not name.startswith(("transformer.", "base_model.model.", "diffusion_model.", "transformer_blocks.")):
        return None
    bare = name.removeprefix("base_model.model.").removeprefix("diffusion_model.").removeprefix(_PREFIX)
    split = re.fullmatch(r"(.+?)\.((?:lora_\w+|alpha).*)", bare)
    if not split or split[2] not in _PARTS:
        return None
    return f"{split[1]}.{_PARTS[split[2]]}"


def metadata_adapter(metadata: Mapping[str, str], config: Path | None) -> dict[str, Any]:
    """What is stored of the PEFT ``LoraConfig``; empty if nothing is.

    Raises:
        ValueError: if it is there and cannot be understood, or is of another kind of adapter.
        OSError: if ``config`` cannot be read.
    """
    text = metadata.get(ADAPTER_KEY) or metadata.get(_FINETRAINERS_KEY)
    if config is not None:
        text = config.read_text("utf-8")
    if text is None:
        return {}
    try:
        stored = {str(key).removeprefix(_PREFIX): value for key, value in json.loads(text).items()}
    except (AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if stored.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"it is a {stored['peft_type']} adapter, not a LoRA")
    return stored


def check_pattern(pattern: str) -> None:
    """Refuse a regular expression from a file that is none, or that could take for ever to match.

    Names of layers need no repeated groups and few repetitions; each more multiplies the work by the name's length.

    Raises:
        ValueError: saying why.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:60]!r} is no regular expression: {error}") from None
    bare = re.sub(r"\\.", "x", pattern, flags=re.DOTALL).replace("(?", "(")
    repeats = re.findall(r"[*+?{]", bare)
    if len(pattern) > _LONGEST_PATTERN or len(repeats) > _MOST_REPEATS or re.search(r"\)[*+?{]", bare):
        raise ValueError(f"the pattern {pattern[:60]!r} is too involved for names of layers")


def alpha_of_layer(layer: str, patterns: Mapping[str, float], otherwise: float) -> float:
    """Alpha of a layer by PEFT's rule: the first pattern that matches the end of its name at a dot."""
    for pattern, alpha in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return alpha
    return otherwise
