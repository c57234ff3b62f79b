"""The LoRA file: diffusers' format, plus where the LoRA comes from.

``pytorch_lora_weights.safetensors`` holds ``transformer.<module>.lora_A.weight`` [rank, in] and
``transformer.<module>.lora_B.weight`` [out, rank]. Its metadata has two texts beside ``format``:

``lora_adapter_metadata``
    The PEFT ``LoraConfig`` as JSON, each key prefixed by ``transformer.``. Stock ``pipe.load_lora_weights``
    builds the adapter from it and so applies the trained alpha / rank; without it, it takes alpha = rank.
``cogcache``
    :class:`Provenance` as JSON: base model and its facts, cache fingerprint, and the training clips' frames,
    size and fps. diffusers ignores it; ``cogcache infer`` takes its defaults from it.

Files of other tools are read too (:mod:`cogcache.lora_foreign`). Files are never unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cogcache.errors import LoraError, StorageError
from cogcache.lora_foreign import ADAPTER_KEY as _ADAPTER_KEY
from cogcache.lora_foreign import canonical_names, find_weights, metadata_adapter
from cogcache.tensorfile import read_tensor_header
from cogcache.variants import Variant

if TYPE_CHECKING:
    import torch

__all__ = ["LORA_FILE_NAME", "LoraHeader", "Provenance", "read_lora_header", "save_lora", "save_tensors"]

LORA_FILE_NAME = "pytorch_lora_weights.safetensors"

_PREFIX = "transformer."
_OUR_KEY = "cogcache"

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


class Provenance(BaseModel):
    """Where a LoRA comes from. ``None``: not known.

    ``base_model`` is the hub id or folder it was trained on, ``fingerprint`` that of the cache's manifest;
    ``frames``, ``size`` (HEIGHTxWIDTH in pixels) and ``fps`` are those of most training clips.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    base_model: str | None = None
    variant: Variant | None = None
    fingerprint: str | None = None
    frames: int | None = None
    size: str | None = None
    fps: float | None = None


@dataclass(frozen=True)
class LoraHeader:
    """What the header of a LoRA file says.

    Attributes:
        path: The file or folder asked for.
        shapes: Shape of each tensor, by canonical name (:mod:`cogcache.lora_foreign`).
        rank: The rank, or the highest if layers differ.
        alpha: The trained alpha; ``None`` if the file does not say.
        adapter: The ``LoraConfig`` keys stored; empty for foreign files that do not say their alpha.
        provenance: All ``None`` for files not made by this project.
        file: The weights file.
        names: Name in the file of each tensor, by canonical name.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    rank: int
    alpha: float | None
    adapter: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    file: Path = Path()
    names: dict[str, str] = field(default_factory=dict)

    @property
    def base_model(self) -> str | None:
        """Hub id or folder of the model it was trained on."""
        return self.provenance.base_model

    @property
    def variant(self) -> Variant | None:
        """Facts of the model it was trained on."""
        return self.provenance.variant

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the cache it was trained from."""
        return self.provenance.fingerprint

    @property
    def frames(self) -> int | None:
        """Frames of the training clips."""
        return self.provenance.frames

    @property
    def size(self) -> str | None:
        """Size of the training clips, HEIGHTxWIDTH in pixels."""
        return self.provenance.size

    @property
    def fps(self) -> float | None:
        """Frames per second of the training clips."""
        return self.provenance.fps


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
        _ADAPTER_KEY: _dump({_PREFIX + key: value for key, value in _adapter_of(lora_config).items()}),
        _OUR_KEY: provenance.model_dump_json(),
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


def read_lora_header(path: Path) -> LoraHeader:
    """Read what a LoRA says about itself; no tensor data is read but alphas stored as tensors.

    Args:
        path: A file, or a folder with ``adapter_model.safetensors`` or ``pytorch_lora_weights.safetensors``.

    Raises:
        LoraError: if it is missing, not a safetensors file, not a LoRA for a transformer, or damaged.
    """
    file, config = find_weights(path, [LORA_FILE_NAME])
    try:
        header = read_tensor_header(file)
    except FileNotFoundError:
        raise LoraError(f"there is no LoRA file {str(file)!r}.") from None
    except OSError as error:
        raise LoraError(f"{file} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise LoraError(
            f"{file} is not a LoRA file: {error}.", "A .safetensors file is needed; pickles are never loaded."
        ) from None
    names, shapes, alphas = _lora_shapes(file, header.shapes)
    adapter = _adapter_in(file, header.metadata, config) or _adapter_of_tensors(file, shapes, alphas)
    return LoraHeader(
        path=path,
        shapes=shapes,
        rank=max(shape[0] for name, shape in shapes.items() if name.endswith("lora_A.weight")),
        alpha=float(adapter["lora_alpha"]) if adapter else None,
        adapter=adapter,
        provenance=_provenance_in(file, header.metadata),
        file=file,
        names=names,
    )


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


def _lora_shapes(
    path: Path, stored: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, tuple[int, ...]], dict[str, str]]:
    """Names in the file and shapes by canonical name; and the names of alpha tensors by layer."""
    try:
        canonical = canonical_names(stored)
    except ValueError as error:
        raise LoraError(f"{path} holds {error}.") from None
    names = {name: raw for raw, name in canonical.items() if not name.endswith(".alpha")}
    alphas = {name.removesuffix(".alpha"): raw for raw, name in canonical.items() if name.endswith(".alpha")}
    shapes = {name: stored[raw] for name, raw in names.items()}
    down = [name for name in shapes if name.endswith(".lora_A.weight")]
    if not down:
        raise LoraError(f"{path} is not a LoRA file: it holds no lora_A weights.")
    if any(len(shapes[name]) != 2 or not math.prod(shapes[name]) for name in down):
        raise LoraError(f"{path} holds LoRA weights that are not matrices.")
    alone = [name for name in down if name.replace("lora_A", "lora_B") not in shapes]
    if alone:
        raise LoraError(f"{path} is incomplete: {alone[0][:100]} has no lora_B.")
    return names, shapes, alphas


def _adapter_in(path: Path, metadata: Mapping[str, str], config: Path | None) -> dict[str, Any]:
    """The stored ``LoraConfig`` keys, checked as far as they are used; empty if there are none."""
    try:
        stored = metadata_adapter(metadata, config)
        if not stored:
            return {}
        if not (math.isfinite(stored["lora_alpha"]) and isinstance(stored["r"], int)):
            raise ValueError("alpha or rank is not a number")
        for pattern, alpha in (stored.get("alpha_pattern") or {}).items():
            re.compile(pattern)
            if not math.isfinite(alpha):
                raise ValueError("alpha is not a number")
    except (ArithmeticError, AttributeError, KeyError, OSError, TypeError, ValueError, re.error) as error:
        raise LoraError(f"{path} has damaged adapter metadata: {error}.") from None
    return stored


def _adapter_of_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], alphas: Mapping[str, str]
) -> dict[str, Any]:
    """LoRA settings from one alpha tensor per layer; empty if there are none."""
    if not alphas:
        return {}
    layers = [name.removesuffix(".lora_A.weight") for name in shapes if name.endswith(".lora_A.weight")]
    without = [layer for layer in layers if layer not in alphas]
    if without:
        raise LoraError(f"{path} says alpha for some layers, but not for {without[0][:100]}.")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        values = {layer: float(file.get_tensor(alphas[layer]).reshape(-1)[0]) for layer in layers}
    if not all(map(math.isfinite, values.values())):
        raise LoraError(f"{path} says an alpha that is not a number.")
    first = values[layers[0]]
    pattern = {"^" + re.escape(layer): alpha for layer, alpha in values.items() if alpha != first}
    return {"r": shapes[f"{layers[0]}.lora_A.weight"][0], "lora_alpha": first, "alpha_pattern": pattern}


def _provenance_in(path: Path, metadata: Mapping[str, str]) -> Provenance:
    text = metadata.get(_OUR_KEY)
    if text is None:
        return Provenance()
    try:
        return Provenance.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors()[0]
        where = ".".join(str(part) for part in reason["loc"])
        raise LoraError(f"{path} has damaged metadata: {where} {reason['msg']}.") from None
