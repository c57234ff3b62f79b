"""Checkpoints that are whole or not there.

A checkpoint is a folder ``checkpoint-000100`` in the run's output::

    pytorch_lora_weights.safetensors   the LoRA as it would be at this step; loads in stock diffusers. Or
    transformer/, cogcache.json        ... the fine-tuned transformer in float32
    optimizer.safetensors              AdamW moments and step, by parameter name; several files if large
    trainer_state.json                 step, what the run is, loss scaler, sha256 of the other files

It is written under another name, made durable, and renamed: a folder of the right name is complete.
Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cogcache.cache.files import make_folder, rename, storage_errors, sync_folder, write_file
from cogcache.cache.regular import read_regular
from cogcache.errors import CheckpointError
from cogcache.train.shards import save_shards

__all__ = [
    "Checkpoint",
    "TrainerState",
    "checkpoint_folder",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
]

OPTIMIZER = "optimizer"
STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d{6,})")


@dataclass(frozen=True)
class TrainerState:
    """What a run must know besides tensors. ``run`` decides whether a checkpoint is of this run."""

    step: int
    run: Mapping[str, Any]
    scaler: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; tensors on the CPU."""

    state: TrainerState
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def checkpoint_folder(output: Path, step: int) -> Path:
    """``output/checkpoint-000100`` for step 100."""
    return output / f"checkpoint-{step:06d}"


def list_checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders in ``output``, oldest first, judged by name alone."""
    found = [(int(m[1]), path) for path in output.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    output: Path, state: TrainerState, save_weights: Callable[[Path], None], optimizer: Mapping[str, Tensor]
) -> Path:
    """Write a checkpoint; durable on return.

    Args:
        save_weights: Writes the trained weights into the folder it is given, durably.
        optimizer: Its tensors; nobody may change them meanwhile.

    Raises:
        StorageError: if the disk is full or cannot be written. The folder then does not exist.
    """
    folder = checkpoint_folder(output, state.step)
    draft = folder.with_name(folder.name + ".tmp")
    with storage_errors(draft):
        _remove_tree(draft)
        _remove_tree(folder)
        make_folder(draft)
        save_weights(draft)
        save_shards(draft, OPTIMIZER, optimizer)
        hashes = {name: _sha256(path) for name, path in _files(draft).items()}
        record = {"step": state.step, "run": state.run, "scaler": state.scaler, "sha256": hashes}
        write_file(draft / STATE_FILE, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
        sync_folder(draft)
    rename(draft, folder)
    return folder


def _sha256(path: Path) -> str:
    """Of the bytes on disk now; the remembered hashes of :mod:`cogcache.hashing` would hide damage."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """Every file of a checkpoint but its record, by its name relative to ``folder``."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if name != STATE_FILE}


def prune_checkpoints(output: Path, keep: int) -> None:
    """Delete the oldest checkpoints beyond ``keep`` (0 keeps all) and drafts that a crash left behind."""
    for draft in output.glob("checkpoint-*.tmp"):
        _remove_tree(draft)
    if keep:
        for folder in list_checkpoints(output)[:-keep]:
            _remove_tree(folder)


def _remove_tree(folder: Path) -> None:
    """Remove a folder so that a crash in between leaves no half of it under a checkpoint's name."""
    if not folder.exists():
        return
    with storage_errors(folder):
        if not folder.name.endswith(".tmp"):
            doomed = folder.with_name(folder.name + ".tmp")
            shutil.rmtree(doomed, ignore_errors=True)
            folder = folder.rename(doomed)
        shutil.rmtree(folder)


def find_checkpoint(output: Path, resume: str) -> Checkpoint | None:
    """The checkpoint that ``--resume`` names: a folder, or the newest undamaged one for ``latest``.

    Returns:
        None for ``latest`` where there is no checkpoint at all.

    Raises:
        CheckpointError: if the named folder is missing or damaged, or all of ``latest`` are damaged.
    """
    if resume != "latest":
        return load_checkpoint(Path(resume))
    damage: list[str] = []
    for folder in reversed(list_checkpoints(output)):
        try:
            return load_checkpoint(folder)
        except CheckpointError as error:
            damage.append(error.message)
    if damage:
        raise CheckpointError(
            "no checkpoint is undamaged: " + " ".join(damage),
            f"Delete them or choose another output than {output}.",
        )
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check every byte of it.

    Raises:
        CheckpointError: if it is missing, incomplete or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no checkpoint folder {folder}.", "Give an existing one, or --resume latest."
        )
    try:
        record = json.loads(read_regular(folder / STATE_FILE))
        if type(record["step"]) is not int or record["step"] < 0:
            raise ValueError("its step is none")
        if not all(_is_number_of_scaler(name, value) for name, value in dict(record["scaler"]).items()):
            raise ValueError("its loss scaling is none")
        state = TrainerState(step=record["step"], run=dict(record["run"]), scaler=dict(record["scaler"]))
        files = _files(folder)
        for name, written in sorted(record["sha256"].items()):
            if name not in files or _sha256(files[name]) != written:
                raise ValueError(f"{name} is not what was written")
        weights, optimizer = _read_tensors(files[name] for name in record["sha256"])
        return Checkpoint(state, weights, optimizer)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise CheckpointError(
            f"{folder} is damaged: {error}.", "Delete it and resume from an earlier one."
        ) from None


def _is_number_of_scaler(name: str, value: object) -> bool:
    if name in ("growth_interval", "_growth_tracker"):
        return type(value) is int and 0 <= value < 2**31
    return type(value) is float and 0 < value < 2**127  # it becomes a float32


def _read_tensors(files: Iterable[Path]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, by names without ``transformer.``, and optimizer state."""
    weights: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    for path in files:
        if path.suffix != ".safetensors":
            continue
        if path.name.startswith(OPTIMIZER):
            optimizer.update(load_file(path))
        else:
            weights.update({k.removeprefix("transformer."): v for k, v in load_file(path).items()})
    return weights, optimizer
