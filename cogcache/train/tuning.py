"""What of the transformer is trained, in which precision, and what is written: the one place where
``--training-type`` decides.

===============  =============================================  =====================================
                 LoRA                                           full
===============  =============================================  =====================================
trained          LoRA matrices, float32                         every parameter, float32 masters
frozen           the base, in the compute dtype                 learned positions (a buffer, not a
                                                                parameter), where the model has them
forward          base in the compute dtype, LoRA products in    matrix products in the compute dtype by
                 float32, no autocast                           autocast; norms in float32
gradients        float32                                        float32
result           ``pytorch_lora_weights.safetensors``           ``transformer/`` in the compute dtype
checkpoint       the same file                                  ``transformer/`` in float32
===============  =============================================  =====================================

The compute dtype is ``--dtype``, by default that of the base's weights. In float32 autocast is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from cogcache.config import TrainConfig
from cogcache.finetuned import TRANSFORMER_FOLDER
from cogcache.lora import LORA_FILE_NAME, Provenance
from cogcache.train.full import full_state, load_full_state, train_everything, write_finetuned
from cogcache.train.model import add_lora, load_lora_state, lora_state, write_lora

__all__ = ["FullTuning", "LoraTuning", "Tuning", "tuning_for"]


class Tuning(Protocol):
    """One way of training a transformer.

    ``result`` is the name of what it writes to the output folder; ``held_in`` the dtype to load the base in.
    """

    result: str
    held_in: torch.dtype

    def prepare(self, transformer: nn.Module) -> None:
        """Set the loaded, frozen ``transformer`` up in place: what is to be trained requires a gradient."""
        ...

    def restore(self, transformer: nn.Module, weights: dict[str, Tensor]) -> None:
        """Put back what a checkpoint holds.

        Raises:
            CheckpointError: if it is not of this model and these settings.
        """
        ...

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        """What is trained, on its device and not copied."""
        ...

    def write_checkpoint(self, folder: Path, transformer: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Write ``state``, exactly, into a checkpoint's folder that is not yet under its name."""
        ...

    def write_result(self, output: Path, transformer: nn.Module) -> None:
        """Write what the run is for into its output folder, complete or not at all."""
        ...


class LoraTuning:
    """A float32 LoRA in a frozen base."""

    result = LORA_FILE_NAME

    def __init__(self, config: TrainConfig, provenance: Provenance, dtype: torch.dtype) -> None:
        self.config, self.provenance, self.held_in = config, provenance, dtype

    def prepare(self, transformer: nn.Module) -> None:
        """See :class:`Tuning`."""
        add_lora(transformer, self.config)

    def restore(self, transformer: nn.Module, weights: dict[str, Tensor]) -> None:
        """See :class:`Tuning`."""
        load_lora_state(transformer, weights)

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        """See :class:`Tuning`."""
        return lora_state(transformer)

    def write_checkpoint(self, folder: Path, transformer: nn.Module, state: Mapping[str, Tensor]) -> None:
        """See :class:`Tuning`."""
        write_lora(folder / LORA_FILE_NAME, transformer, self.provenance, state)

    def write_result(self, output: Path, transformer: nn.Module) -> None:
        """See :class:`Tuning`."""
        write_lora(output / LORA_FILE_NAME, transformer, self.provenance)


class FullTuning:
    """Every parameter, as float32 masters under autocast."""

    result = TRANSFORMER_FOLDER
    held_in = torch.float32

    def __init__(self, provenance: Provenance, device: torch.device, dtype: torch.dtype) -> None:
        self.provenance, self.device, self.dtype = provenance, device, dtype

    def prepare(self, transformer: nn.Module) -> None:
        """See :class:`Tuning`."""
        train_everything(transformer, self.device, self.dtype)

    def restore(self, transformer: nn.Module, weights: dict[str, Tensor]) -> None:
        """See :class:`Tuning`."""
        load_full_state(transformer, weights)

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        """See :class:`Tuning`."""
        return full_state(transformer)

    def write_checkpoint(self, folder: Path, transformer: nn.Module, state: Mapping[str, Tensor]) -> None:
        """See :class:`Tuning`."""
        write_finetuned(folder, transformer, torch.float32, self.provenance, state)

    def write_result(self, output: Path, transformer: nn.Module) -> None:
        """See :class:`Tuning`."""
        write_finetuned(output, transformer, self.dtype, self.provenance)


def tuning_for(
    config: TrainConfig, provenance: Provenance, device: torch.device, dtype: torch.dtype
) -> Tuning:
    """The strategy of ``--training-type`` for training on ``device``, computing in ``dtype``."""
    if config.training_type == "full":
        return FullTuning(provenance, device, dtype)
    return LoraTuning(config, provenance, dtype)
