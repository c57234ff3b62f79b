"""Full fine-tuning: every parameter trained, and written as a transformer in diffusers layout.

The masters are float32, because a step of 1e-5 of a weight is lost in bfloat16, whose neighbours are 1/256
apart. Autocast runs the matrix products in the compute dtype, as the pipelines will. It wraps the
transformer's forward alone: noising, positions and the loss stay float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogcache.cache.files import make_folder, remove_tree, rename, sync_folder, write_atomic, write_file
from cogcache.errors import CheckpointError
from cogcache.finetuned import RECORD_FILE, TRANSFORMER_FOLDER
from cogcache.lora import Provenance
from cogcache.train.shards import save_shards

__all__ = ["full_state", "load_full_state", "train_everything", "write_finetuned"]

_STEM = "diffusion_pytorch_model"  # diffusers.utils.SAFETENSORS_WEIGHTS_NAME


def train_everything(transformer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let every parameter of a float32 ``transformer`` be trained, its forward under autocast to ``dtype``.

    The learned positions of 5B-I2V are a buffer and stay as they are.
    """
    transformer.requires_grad_(True)
    if dtype != torch.float32:
        bare: Any = transformer
        bare.forward = torch.autocast(device.type, dtype=dtype)(bare.forward)


def full_state(transformer: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, on their device, not copied."""
    return {name: tensor.detach() for name, tensor in transformer.state_dict().items()}


def load_full_state(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what :func:`full_state` gave.

    Raises:
        CheckpointError: if names or shapes are not those of this transformer.
    """
    wanted = {name: tensor.shape for name, tensor in full_state(transformer).items()}
    if wanted != {name: tensor.shape for name, tensor in state.items()}:
        raise CheckpointError("the transformer in the checkpoint has other layers than this model.")
    transformer.load_state_dict(state)


def write_finetuned(
    root: Path,
    transformer: nn.Module,
    dtype: torch.dtype,
    provenance: Provenance,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``root/transformer`` in diffusers layout, and beside it where it comes from.

    Durable; the folder is complete or not there, and one that is there is replaced. Equal weights give equal
    bytes.

    Args:
        dtype: What floating tensors are stored in.
        state: Its weights as :func:`full_state` gives them; default: those it has.

    Returns:
        The folder ``root/transformer``.

    Raises:
        StorageError: if the disk is full or cannot be written.
    """
    folder = root / TRANSFORMER_FOLDER
    draft = root / f"{TRANSFORMER_FOLDER}.tmp"
    remove_tree(draft)
    make_folder(draft)
    _write_transformer(draft, transformer, dtype, full_state(transformer) if state is None else state)
    record = {"training_type": "full", **provenance.model_dump(mode="json")}
    write_atomic(root / RECORD_FILE, _json(record))
    remove_tree(folder)
    rename(draft, folder)
    return folder


def _write_transformer(
    folder: Path, transformer: nn.Module, dtype: torch.dtype, state: Mapping[str, Tensor]
) -> None:
    bare: Any = transformer
    config = json.loads(bare.to_json_string())
    config.pop("_name_or_path", None)  # where the base lay is in the record, if it matters
    write_file(folder / "config.json", _json(config))
    places = save_shards(folder, _STEM, state, dtype)
    if len(set(places.values())) > 1:
        total = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_file(folder / f"{_STEM}.safetensors.index.json", _json(index))
    sync_folder(folder)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
