"""The stock diffusers pipeline, set up as the plan says."""

from __future__ import annotations

import logging
from typing import Any

from cogcache.finetuned import TRANSFORMER_FOLDER
from cogcache.infer.plan import Plan
from cogcache.lora.weights import read_lora
from cogcache.models import check_model_index, loading, pick_device, torch_dtype
from cogcache.tiling import set_decode_tiling

__all__ = ["load_pipeline"]

_log = logging.getLogger(__name__)
_ADAPTER = "cogcache"


def load_pipeline(plan: Plan) -> Any:
    """Load the pipeline with scheduler, LoRA, tiling and placement set; its own progress bar is off.

    Only safetensors are read, and no code of the checkpoint's is run.

    Raises:
        ModelError: if the checkpoint is damaged, or names classes of its own.
    """
    check_model_index(plan.model)
    with loading("model", plan.model):
        pipe = _pipeline_class(plan).from_pretrained(
            plan.model,
            dtype=torch_dtype(plan.dtype),
            use_safetensors=True,
            local_files_only=True,
            **_finetuned(plan),
        )
    pipe.set_progress_bar_config(disable=True)
    _set_scheduler(pipe, plan.config.scheduler)
    if plan.lora:
        _set_lora(pipe, plan)
    if plan.config.tiling:
        set_decode_tiling(pipe.vae, plan.size)
    if plan.mode == "i2v":
        _encode_whole(pipe.vae)
    _place(pipe, plan)
    return pipe


def _finetuned(plan: Plan) -> dict[str, Any]:
    """The fine-tuned transformer, to be put in the place of the base model's, which is then not loaded."""
    from diffusers import CogVideoXTransformer3DModel

    if plan.finetuned is None:
        return {}
    with loading("transformer", plan.finetuned.root):
        transformer = CogVideoXTransformer3DModel.from_pretrained(
            plan.finetuned.root,
            subfolder=TRANSFORMER_FOLDER,
            torch_dtype=torch_dtype(plan.dtype),
            use_safetensors=True,
            local_files_only=True,
        )
    return {"transformer": transformer}


def _pipeline_class(plan: Plan) -> Any:
    import diffusers

    if plan.mode == "v2v" and plan.variant.patch_size_t is not None:
        from cogcache.infer.video2video import PaddedVideoToVideoPipeline

        return PaddedVideoToVideoPipeline
    names = {
        "t2v": "CogVideoXPipeline",
        "i2v": "CogVideoXImageToVideoPipeline",
        "v2v": "CogVideoXVideoToVideoPipeline",
    }
    return getattr(diffusers, names[plan.mode])


def _set_scheduler(pipe: Any, choice: str) -> None:
    import diffusers

    kinds = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}
    if choice in kinds:
        pipe.scheduler = kinds[choice].from_config(pipe.scheduler.config)


def _set_lora(pipe: Any, plan: Plan) -> None:
    """Load, weigh and perhaps merge the LoRA. At scale 0 PEFT adds an exact zero.

    What ``pipe.load_lora_weights`` does after it has read a file; it would not find alpha in other tools' files.
    """
    assert plan.lora
    lora = read_lora(plan.lora, plan.config.lora_alpha)
    pipe.load_lora_into_transformer(
        {f"transformer.{name}": tensor for name, tensor in lora.tensors.items()},
        pipe.transformer,
        adapter_name=_ADAPTER,
        metadata={f"transformer.{name}": value for name, value in lora.settings.items()},
        _pipeline=pipe,
        low_cpu_mem_usage=True,
    )
    pipe.set_adapters([_ADAPTER], [plan.config.lora_scale])
    if plan.config.fuse:
        pipe.fuse_lora()  # merges at the weight set above


def _encode_whole(vae: Any) -> None:
    """Encode the first frame whole even where decoding is tiled, as it was for training; it is one picture."""
    encode = vae.encode

    def encode_whole(*inputs: Any, **options: Any) -> Any:
        tiling, vae.use_tiling = vae.use_tiling, False
        try:
            return encode(*inputs, **options)
        finally:
            vae.use_tiling = tiling

    vae.encode = encode_whole


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
