"""Writing LoRA files: durable, complete or not at all, and the same bytes for the same input."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcache.errors import LoraError, StorageError
from cogcache.lora.foreign import ADAPTER_KEY
from cogcache.lora.header import PROVENANCE_KEY, Provenance

if TYPE_CHECKING:
    import torch

__all__ = ["save_lora", "save_tensors"]

_PREFIX = "transformer."

# What of a PEFT LoraConfig decides the adapter's function. The rest is left out, because an older PEFT
# refuses a config with a key that it does not know.
_ALWAYS = ("r", "lora_alpha", "target_modules")
_IF_SET = (
    "alpha_pattern",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "lora_bias",
    "lora_dropout",
    "rank_pattern",
    "use_dora",
    "use_rslora",
)


def save_lora(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    lora_config: Mapping[str, Any],
    provenance: Provenance,
) -> Path:
    """Write a LoRA file, durable and complete or not at all. Equal input gives equal bytes.

    Args:
        path: The file to write or to replace.
        tensors: As ``peft.get_peft_model_state_dict`` gives them, names without ``transformer.``, any device.
        lora_config: ``peft.LoraConfig.to_dict()`` of the adapter.

    Raises:
        LoraError: if there are no tensors, or one is not of a LoRA or is empty.
        StorageError: if the file cannot be written.
    """
    _check_tensors(tensors)
    metadata = {
        "format": "pt",
        ADAPTER_KEY: _dump({_PREFIX + key: value for key, value in _adapter_of(lora_config).items()}),
        PROVENANCE_KEY: provenance.model_dump_json(),
    }
    return save_tensors(path, {_PREFIX + name: tensor for name, tensor in tensors.items()}, metadata)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file, durable and complete or not at all. Equal input gives equal bytes.

    Raises:
        StorageError: if the file cannot be written.
    """
    content = _serialise(tensors, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from None
    return path


def _check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    if not tensors:
        raise LoraError("there are no LoRA weights to save.")
    for name, tensor in tensors.items():
        if ".lora_" not in name:
            raise LoraError(f"{name} is not a LoRA weight.")
        if not tensor.numel():
            raise LoraError(f"{name} is empty.", "Gather sharded parameters before saving.")


def _adapter_of(lora_config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: lora_config[key] for key in _ALWAYS}
    kept.update({key: lora_config[key] for key in _IF_SET if lora_config.get(key)})
    return {key: sorted(value) if isinstance(value, set) else value for key, value in kept.items()}


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _serialise(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Bytes of a safetensors file. The library orders metadata at random, so the header is written anew."""
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    length = int.from_bytes(content[:8], "little")
    header = _dump({"__metadata__": metadata, **json.loads(content[8 : 8 + length])}).encode()
    header += b" " * (-len(header) % 8)  # tensor data stays aligned
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(content)[8 + length :]])


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
