"""The stock diffusers pipeline, set up as the plan says."""

from __future__ import annotations

import logging
from typing import Any

from cogcache.infer.plan import PIPELINES, Plan
from cogcache.models import pick_device, torch_dtype
from cogcache.quiet import quiet_libraries
from cogcache.tiling import set_decode_tiling

__all__ = ["load_pipeline"]

_log = logging.getLogger(__name__)
_ADAPTER = "cogcache"


def load_pipeline(plan: Plan) -> Any:
    """Load the pipeline with scheduler, LoRA, tiling and placement set; its own progress bar is off.

    Only safetensors are read.
    """
    import diffusers

    with quiet_libraries():
        pipe = getattr(diffusers, PIPELINES[plan.variant.task]).from_pretrained(
            plan.model, dtype=torch_dtype(plan.dtype), use_safetensors=True, local_files_only=True
        )
    pipe.set_progress_bar_config(disable=True)
    _set_scheduler(pipe, plan.config.scheduler)
    if plan.lora:
        _set_lora(pipe, plan)
    if plan.config.tiling:
        set_decode_tiling(pipe.vae, plan.size)
    _place(pipe, plan)
    return pipe


def _set_scheduler(pipe: Any, choice: str) -> None:
    import diffusers

    kinds = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}
    if choice in kinds:
        pipe.scheduler = kinds[choice].from_config(pipe.scheduler.config)


def _set_lora(pipe: Any, plan: Plan) -> None:
    """Load, weigh and perhaps merge the LoRA. At scale 0 PEFT adds an exact zero."""
    assert plan.lora
    pipe.load_lora_weights(plan.lora.path, adapter_name=_ADAPTER, use_safetensors=True)
    pipe.set_adapters([_ADAPTER], [plan.config.lora_scale])
    if plan.config.fuse:
        pipe.fuse_lora()  # merges at the weight set above


def _place(pipe: Any, plan: Plan) -> None:
    device = pick_device(plan.config.device)
    if plan.config.offload != "none" and device.type == "cpu":
        _log.warning("--offload %s does nothing without a GPU.", plan.config.offload)
    if plan.config.offload == "none" or device.type == "cpu":
        pipe.to(device)
    elif plan.config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
