"""What a LoRA file says about itself, read from its header alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cogcache.errors import LoraError
from cogcache.lora.foreign import canonical_names, check_pattern, find_weights, metadata_adapter
from cogcache.tensorfile import read_tensor_header
from cogcache.variants import Variant

__all__ = ["LORA_FILE_NAME", "PROVENANCE_KEY", "LoraHeader", "Provenance", "read_lora_header"]

LORA_FILE_NAME = "pytorch_lora_weights.safetensors"

_LONGEST_NAME = 300

PROVENANCE_KEY = "cogcache"
"""Name of :class:`Provenance` in a file's metadata."""


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
        shapes: Shape of each tensor, by canonical name (:mod:`cogcache.lora.foreign`).
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
        full = path.is_dir() and (path / "transformer").is_dir()
        hint = f"This is a fine-tuned transformer: give it with --transformer {path}." if full else ""
        raise LoraError(f"there is no LoRA file {str(file)!r}.", hint) from None
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
    long = next((name for name in shapes if len(name) > _LONGEST_NAME), None)
    if long:
        raise LoraError(f"{path} holds a layer with a name of {len(long)} characters, {long[:60]}...")
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
            check_pattern(pattern)
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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            values = {layer: float(file.get_tensor(alphas[layer]).reshape(-1)[0]) for layer in layers}
    except (OSError, SafetensorError, IndexError, RuntimeError, TypeError) as error:
        raise LoraError(f"{path} cannot be read: {error}.") from None
    if not all(map(math.isfinite, values.values())):
        raise LoraError(f"{path} says an alpha that is not a number.")
    first = values[layers[0]]
    pattern = {"^" + re.escape(layer): alpha for layer, alpha in values.items() if alpha != first}
    return {"r": shapes[f"{layers[0]}.lora_A.weight"][0], "lora_alpha": first, "alpha_pattern": pattern}


def _provenance_in(path: Path, metadata: Mapping[str, str]) -> Provenance:
    text = metadata.get(PROVENANCE_KEY)
    if text is None:
        return Provenance()
    try:
        return Provenance.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors()[0]
        where = ".".join(str(part) for part in reason["loc"])
        raise LoraError(f"{path} has damaged metadata: {where} {reason['msg']}.") from None
