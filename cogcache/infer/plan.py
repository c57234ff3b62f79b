"""What will be generated, decided and checked from configs and headers before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cogcache.config import InferConfig
from cogcache.errors import ConfigError, ModelError
from cogcache.geometry import Size, parse_size
from cogcache.infer.inputs import Inputs, read_inputs
from cogcache.lora import LoraHeader, read_lora_header
from cogcache.lora_fit import check_lora_fits
from cogcache.models import resolve_model
from cogcache.variants import Variant, read_variant, weights_dtype

__all__ = ["Mode", "Plan", "plan_inference"]

Mode = Literal["t2v", "i2v", "v2v"]


@dataclass(frozen=True)
class Plan:
    """Everything decided.

    Attributes:
        config: The effective settings: every default filled in, prompts listed. Run again, it gives the same.
        model: Local folder of the base model.
        mode: Text, first frame or video to video.
        inputs: What is given for each video.
        steps: Denoising steps done for each video; with a source video only the last ones are.
        dtype: Name of the floating dtype of all modules.
    """

    config: InferConfig
    model: Path
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
    name, root = _base_model(config, lora)
    variant = read_variant(root)
    mode = _mode(variant, inputs, name)
    if lora:
        check_lora_fits(lora, variant, root / "transformer", name, alpha=config.lora_alpha)
    frames, size, fps = _geometry(config, lora, variant)
    dtype = weights_dtype(root / "transformer") if config.dtype == "auto" else config.dtype
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
    return Plan(effective, root, variant, lora, mode, inputs, steps, frames, size, fps, dtype)


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


def _base_model(config: InferConfig, lora: LoraHeader | None) -> tuple[str, Path]:
    name = config.model or (lora.base_model if lora else None)
    if name is None:
        raise ConfigError(
            f"{config.lora} does not say which model it was trained on.", "Name it with --model."
        )
    try:
        root = resolve_model(name, ("vae", "text_encoder", "tokenizer", "transformer", "scheduler"))
    except ModelError as error:
        if config.model:
            raise
        raise ModelError(
            f"the model that {config.lora} was trained on cannot be used: {error.message}",
            "Name the one to use with --model.",
        ) from None
    return name, root


def _geometry(config: InferConfig, lora: LoraHeader | None, variant: Variant) -> tuple[int, Size, float]:
    frames = config.frames or (lora and lora.frames) or variant.sample_frames
    size_text = config.size or (lora and lora.size)
    size = parse_size(size_text) if size_text else variant.default_size
    variant.check_clip(frames, size)
    return frames, size, config.fps or (lora and lora.fps) or float(variant.native_fps)
