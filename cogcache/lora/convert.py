"""``cogcache convert-lora``: a LoRA in the format another tool takes.

``diffusers``
    One file as this project writes it: keys ``transformer.<module>.lora_A.weight``, the trained alpha in the
    metadata, where stock ``pipe.load_lora_weights`` reads it.
``folded``
    The same keys, with lora_B times its strength, so that alpha = rank gives the trained strength: for tools that
    look at no metadata.
``peft``
    A folder with ``adapter_model.safetensors`` and ``adapter_config.json``, for ``PeftModel.from_pretrained``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from cogcache.errors import ConfigError, StorageError
from cogcache.lora import read_lora_header, save_lora, save_tensors
from cogcache.lora.foreign import PEFT_CONFIG, PEFT_WEIGHTS
from cogcache.lora.weights import LoraWeights, read_lora

__all__ = ["LoraFormat", "convert_lora"]

LoraFormat = Literal["diffusers", "folded", "peft"]
_log = logging.getLogger(__name__)


def convert_lora(source: Path, out: Path, form: LoraFormat, alpha: float | None = None) -> Path:
    """Write the LoRA ``source`` (file or folder, of any format that can be read) as ``out`` in another format.

    Args:
        alpha: For files that do not say theirs; without it alpha = rank is taken, with a warning.

    Returns:
        ``out``.

    Raises:
        ConfigError: if ``out`` is there, has the wrong kind of name, or ``alpha`` contradicts the file.
        LoraError: if the source cannot be used.
        StorageError: if ``out`` cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already.", "Choose another name; nothing is written over.")
    if (form == "peft") == (out.suffix == ".safetensors"):
        kind = "a folder" if form == "peft" else "a .safetensors file"
        raise ConfigError(f"the format {form} is {kind}, and {str(out)!r} is not named like one.")
    header = read_lora_header(source)
    if header.alpha is None and alpha is None:
        _log.warning(
            "%s does not say its alpha; alpha = rank = %d is taken, as diffusers does. If it was trained with "
            "another, give it as --lora-alpha.",
            source,
            header.rank,
        )
    _WRITERS[form](out, read_lora(header, alpha))
    return out


def _write_diffusers(out: Path, lora: LoraWeights) -> None:
    save_lora(out, lora.tensors, lora_config=lora.settings, provenance=lora.header.provenance)


def _write_folded(out: Path, lora: LoraWeights) -> None:
    _write_diffusers(out, lora.folded())


def _write_peft(out: Path, lora: LoraWeights) -> None:
    base = lora.header.base_model
    config = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True}
    try:
        out.mkdir(parents=True)
        text = json.dumps({**config, **lora.settings}, indent=2, sort_keys=True) + "\n"
        (out / PEFT_CONFIG).write_text(text, "utf-8")
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror or error}.") from None
    tensors = {f"base_model.model.{name}": tensor for name, tensor in lora.tensors.items()}
    save_tensors(out / PEFT_WEIGHTS, tensors, {"format": "pt"})


_WRITERS: dict[LoraFormat, Callable[[Path, LoraWeights], None]] = {
    "diffusers": _write_diffusers,
    "folded": _write_folded,
    "peft": _write_peft,
}
