"""What will be generated, decided and checked from configs and headers before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cogcache.config import InferConfig
from cogcache.errors import ConfigError, ModelError
from cogcache.finetuned import Finetuned, read_finetuned
from cogcache.geometry import Size, parse_size
from cogcache.infer.inputs import Inputs, read_inputs
from cogcache.lora import LoraHeader, Provenance, read_lora_header
from cogcache.lora.fit import check_lora_fits, family_differences
from cogcache.models import Component, resolve_model
from cogcache.variants import Variant, read_variant, weights_dtype

__all__ = ["Mode", "Plan", "plan_inference"]

Mode = Literal["t2v", "i2v", "v2v"]


@dataclass(frozen=True)
class Plan:
    """Everything decided.

    Attributes:
        config: The effective settings: every default filled in, prompts listed. Run again, it gives the same.
        model: Local folder of the base model.
        finetuned: Whose transformer takes the place of the base model's, if any.
        mode: Text, first frame or video to video.
        inputs: What is given for each video.
        steps: Denoising steps done for each video; with a source video only the last ones are.
        dtype: Name of the floating dtype of all modules.
    """

    config: InferConfig
    model: Path
    finetuned: Finetuned | None
    variant: Variant
    lora: LoraHeader | None
    mode: Mode
    inputs: Inputs
    steps: int
    frames: int
    size: Size
    fps: float
    dtype: str

    @property
    def prompts(self) -> tuple[str, ...]:
        """One for each of :attr:`outputs`."""
        return self.inputs.prompts

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The files to write."""
        return self.inputs.outputs


def plan_inference(config: InferConfig) -> Plan:
    """Settle the model, the LoRA, the prompts, the geometry and the file names.

    Raises:
        ConfigError, GeometryError, LoraError, ModelError: saying what is wrong.
    """
    inputs = read_inputs(config)
    lora = read_lora_header(config.lora) if config.lora else None
    finetuned = read_finetuned(config.transformer) if config.transformer else None
    name, root = _base_model(config, lora, finetuned)
    variant = read_variant(root)
    transformer = root / "transformer"
    if finetuned:
        _check_finetuned(finetuned, root, variant, name)
        transformer = finetuned.transformer
    mode = _mode(variant, inputs, name)
    if lora:
        check_lora_fits(lora, variant, transformer, name, alpha=config.lora_alpha)
        _check_offload(lora, config)
    frames, size, fps = _geometry(config, _trained_on(lora, finetuned), variant)
    dtype = weights_dtype(transformer) if config.dtype == "auto" else config.dtype
    effective = config.model_copy(
        update={
            "model": name,
            "prompt": list(inputs.prompts),
            "prompts_file": None,
            "image": list(inputs.images),
            "images_file": None,
            "video": list(inputs.videos),
            "frames": frames,
            "size": str(size),
            "fps": fps,
            "dtype": dtype,
        }
    )
    steps = _steps(config, mode)
    return Plan(effective, root, finetuned, variant, lora, mode, inputs, steps, frames, size, fps, dtype)


def _mode(variant: Variant, inputs: Inputs, model: str) -> Mode:
    if variant.task == "i2v":
        if inputs.videos:
            raise ConfigError(
                f"{model} is an image-to-video model and takes no --video.",
                "Give --image, or another --model.",
            )
        if not inputs.images:
            raise ConfigError(
                f"{model} is an image-to-video model: it needs a first frame for each prompt.",
                "Give it with --image or --images-file.",
            )
        return "i2v"
    if inputs.images:
        raise ConfigError(
            f"{model} is a text-to-video model and takes no --image.",
            "Leave it out, or name an image-to-video model with --model.",
        )
    return "v2v" if inputs.videos else "t2v"


def _check_offload(lora: LoraHeader, config: InferConfig) -> None:
    # Accelerate moves what a layer is given to its device, and PEFT's DoRA layers are given a layer that is not there.
    if config.offload == "sequential" and lora.adapter.get("use_dora") and not config.fuse:
        raise ConfigError(
            "--offload sequential cannot run a DoRA beside the model.", "Add --fuse, or use --offload model."
        )


def _steps(config: InferConfig, mode: Mode) -> int:
    """As the video-to-video pipeline counts: the last ``steps * strength``, rounded down."""
    if mode != "v2v":
        return config.steps
    steps = min(int(config.steps * config.strength), config.steps)
    if not steps:
        raise ConfigError(
            f"--strength {config.strength:g} of {config.steps} --steps leaves no step to do.", "Raise either."
        )
    return steps


def _base_model(
    config: InferConfig, lora: LoraHeader | None, finetuned: Finetuned | None
) -> tuple[str, Path]:
    trained = config.transformer or config.lora
    known = finetuned.provenance.base_model if finetuned else lora.base_model if lora else None
    name = config.model or known
    if name is None:
        raise ConfigError(f"{trained} does not say which model it was trained on.", "Name it with --model.")
    parts: tuple[Component, ...] = ("vae", "text_encoder", "tokenizer", "scheduler")
    try:
        root = resolve_model(name, parts if finetuned else (*parts, "transformer"))
    except ModelError as error:
        if config.model:
            raise
        raise ModelError(
            f"the model that {trained} was trained on cannot be used: {error.message}",
            "Name the one to use with --model.",
        ) from None
    return name, root


def _check_finetuned(finetuned: Finetuned, root: Path, variant: Variant, model: str) -> None:
    trained = finetuned.provenance.variant
    differing = family_differences(read_variant(root, finetuned.root), variant)
    differing += family_differences(trained, variant) if trained else []
    if differing:
        raise ModelError(
            f"{finetuned.root} is another kind of transformer than that of {model}: "
            f"{', '.join(dict.fromkeys(differing))}.",
            f"It was trained from {finetuned.provenance.base_model}." if trained else "",
        )


def _trained_on(lora: LoraHeader | None, finetuned: Finetuned | None) -> Provenance:
    """What the last training says; nothing for the base model alone."""
    if lora and lora.frames:
        return lora.provenance
    return finetuned.provenance if finetuned else Provenance()


def _geometry(config: InferConfig, trained: Provenance, variant: Variant) -> tuple[int, Size, float]:
    frames = config.frames or trained.frames or variant.sample_frames
    size_text = config.size or trained.size
    size = parse_size(size_text) if size_text else variant.default_size
    variant.check_clip(frames, size)
    return frames, size, config.fps or trained.fps or float(variant.native_fps)
