"""The trainable model: a frozen transformer in its own dtype, and a float32 LoRA in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogcache.config import TrainConfig
from cogcache.cores import usable_cores
from cogcache.draws import generator
from cogcache.errors import CheckpointError, ConfigError, ModelError
from cogcache.int8 import put_in_int8
from cogcache.lora import Provenance, save_lora
from cogcache.models import loading, torch_dtype
from cogcache.train.adapter import load_init_lora, peft_config
from cogcache.train.weights import read_weights
from cogcache.variants import Variant, expected_dtype, weights_dtype

__all__ = [
    "add_lora",
    "base_dtype",
    "load_lora_state",
    "load_scheduler",
    "load_transformer",
    "lora_state",
    "trainable",
    "write_lora",
]


def base_dtype(root: Path, choice: str, variant: Variant, *, fetched: bool = True) -> torch.dtype:
    """The dtype the frozen transformer runs in.

    Args:
        choice: ``auto`` is that of the weights.
        fetched: Whether the weights must be there; without them, ``auto`` is what they are expected to be.

    Raises:
        ModelError: if they are not there or cannot be read.
        ConfigError: if that would be float16 for a model that was not trained in it: bfloat16's range is far
            wider, and activations of such models overflow float16.
    """
    native = weights_dtype(root / "transformer") if fetched else expected_dtype(root / "transformer", variant)
    name = native if choice == "auto" else choice
    if name == "float16" and not variant.trained_in_float16:
        raise ConfigError(
            "this model was trained in bfloat16; its activations can exceed what float16 holds (65504).",
            "Use --dtype bfloat16 or float32.",
        )
    return torch_dtype(name)


def load_transformer(
    root: Path,
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    int8_home: torch.device | None = None,
) -> nn.Module:
    """Load the transformer alone, frozen, onto ``device``, by default the CPU.

    As ``from_pretrained`` of diffusers does it, but several threads read. Nothing is drawn at random or held twice.

    Args:
        int8_home: Where to keep the blocks' matrices in 8 bits (:mod:`cogcache.int8`), made of each on ``device`` as
            soon as it is read, so that they are never all there in ``dtype``. Default: nowhere.

    Raises:
        ModelError: if its weights are missing or damaged.
    """
    from accelerate import init_empty_weights
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    with loading("transformer", root):
        config = CogVideoXTransformer3DModel.load_config(root, subfolder="transformer", local_files_only=True)
        with init_empty_weights(include_buffers=False):
            transformer = CogVideoXTransformer3DModel.from_config(config)

        def keep(name: str, tensor: Tensor) -> Tensor:
            if int8_home is None or tensor.ndim != 2 or not name.startswith("transformer_blocks."):
                return tensor
            parameter = nn.Parameter(tensor, requires_grad=False)
            put_in_int8(parameter, int8_home)
            return parameter

        weights = read_weights(root / "transformer", dtype, device or torch.device("cpu"), keep)
        wanted = transformer.state_dict()
        differing = [name for name, empty in wanted.items() if weights[name].shape != empty.shape]
        if differing:
            raise ValueError(f"{differing[0]} has another shape than the config says")
        transformer.load_state_dict({name: weights[name] for name in wanted}, assign=True)
    frozen: nn.Module = transformer.requires_grad_(False).train()
    return frozen


def load_scheduler(root: Path) -> Any:
    """The checkpoint's own scheduler (DDIM for 2B, DPM for the others), which knows its alphas.

    Raises:
        ModelError: if it is not one of CogVideoX's two, or its settings are none that it can take.
    """
    from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
    from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler

    from cogcache.variants import read_config

    name = read_config(root, "scheduler/scheduler_config.json").get("_class_name")
    for kind in (CogVideoXDDIMScheduler, CogVideoXDPMScheduler):
        if kind.__name__ == name:
            with loading("scheduler", root):
                return kind.from_pretrained(root, subfolder="scheduler", local_files_only=True)
    raise ModelError(
        f"{root} has the scheduler {name!r}; CogVideoXDDIMScheduler or CogVideoXDPMScheduler needed."
    )


def add_lora(transformer: nn.Module, config: TrainConfig) -> None:
    """Add a LoRA in place, float32: that of ``--init-lora``, else lora_A Kaiming-uniform from the seed and the
    layer's name and lora_B zero.

    Raises:
        ConfigError: naming the target modules that match no layer.
        LoraError: if the file of ``--init-lora`` does not fit.
    """
    _inject(transformer, config)
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(lambda item: _start(item[0], item[1], config.seed), trainable(transformer).items()))
    load_init_lora(transformer, config)


def _inject(transformer: nn.Module, config: TrainConfig) -> None:
    """Let PEFT put its layers in, float32, values still to come."""
    adapter: Any = transformer
    place = next(transformer.parameters()).device
    # On no device: PEFT would draw 66 million values for a 5B's LoRA of rank 128, to be thrown away.
    with nullcontext() if config.dora else torch.device("meta"):
        adapter.add_adapter(peft_config(transformer, config))
    for module in transformer.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=place, recurse=False)
    for parameter in trainable(transformer).values():
        parameter.data = parameter.data.float()  # PEFT gives it the base's dtype where it has the values


def _start(name: str, parameter: nn.Parameter, seed: int) -> None:
    """First values of a layer's A, on the CPU, so that they do not depend on the device; B is zero."""
    if "lora_A" in name:
        drawn = torch.empty(parameter.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator(seed, "lora init", name))
        parameter.data.copy_(drawn)
    elif "lora_B" in name:
        parameter.data.zero_()


def trainable(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def lora_state(transformer: nn.Module) -> dict[str, Tensor]:
    """The LoRA's tensors on their device, not copied, by the names PEFT saves (``....to_q.lora_A.weight``)."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer)
    return {name: tensor.detach() for name, tensor in state.items()}


def load_lora_state(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what :func:`lora_state` gave.

    Raises:
        CheckpointError: if names or shapes are not those of this LoRA.
    """
    from peft import set_peft_model_state_dict

    wanted = {name: tuple(tensor.shape) for name, tensor in lora_state(transformer).items()}
    if wanted != {name: tuple(tensor.shape) for name, tensor in state.items()}:
        raise CheckpointError("the LoRA in the checkpoint has other layers or another rank than this run.")
    set_peft_model_state_dict(transformer, state)


def write_lora(
    path: Path, transformer: nn.Module, provenance: Provenance, state: Mapping[str, Tensor] | None = None
) -> Path:
    """Write the LoRA of ``transformer``, durable and complete or not at all; equal weights give equal bytes.

    Args:
        state: Its tensors as :func:`lora_state` gives them; default: those it has.
    """
    adapter: Any = transformer
    config = adapter.peft_config["default"].to_dict()
    tensors = lora_state(transformer) if state is None else state
    return save_lora(path, tensors, lora_config=config, provenance=provenance)
