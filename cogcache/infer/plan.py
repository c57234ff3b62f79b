"""What will be generated, decided and checked from configs and headers before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cogcache.config import InferConfig
from cogcache.errors import ConfigError, ModelError
from cogcache.geometry import Size, parse_size
from cogcache.infer.fit import check_lora_fits
from cogcache.lora import LoraHeader, read_lora_header
from cogcache.models import resolve_model
from cogcache.variants import Variant, read_variant, weights_dtype

__all__ = ["PIPELINES", "Plan", "plan_inference"]

# The diffusers pipeline of each task: the one place where the task decides.
PIPELINES = {"t2v": "CogVideoXPipeline"}


@dataclass(frozen=True)
class Plan:
    """Everything decided.

    Attributes:
        config: The effective settings: every default filled in, prompts listed. Run again, it gives the same.
        model: Local folder of the base model.
        prompts: One for each of ``outputs``.
        dtype: Name of the floating dtype of all modules.
    """

    config: InferConfig
    model: Path
    variant: Variant
    lora: LoraHeader | None
    prompts: tuple[str, ...]
    outputs: tuple[Path, ...]
    frames: int
    size: Size
    fps: float
    dtype: str


def plan_inference(config: InferConfig) -> Plan:
    """Settle the model, the LoRA, the prompts, the geometry and the file names.

    Raises:
        ConfigError, GeometryError, LoraError, ModelError: saying what is wrong.
    """
    prompts, outputs = _prompts_and_outputs(config)
    lora = read_lora_header(config.lora) if config.lora else None
    name, root = _base_model(config, lora)
    variant = read_variant(root)
    if variant.task not in PIPELINES:
        raise ConfigError(
            f"{name} is an image-to-video model, and 'cogcache infer' does not take a first frame yet.",
            "Load the LoRA in diffusers' CogVideoXImageToVideoPipeline.",
        )
    if lora:
        check_lora_fits(lora, variant, root / "transformer", name)
    frames, size, fps = _geometry(config, lora, variant)
    dtype = weights_dtype(root / "transformer") if config.dtype == "auto" else config.dtype
    effective = config.model_copy(
        update={
            "model": name,
            "prompt": list(prompts),
            "prompts_file": None,
            "frames": frames,
            "size": str(size),
            "fps": fps,
            "dtype": dtype,
        }
    )
    return Plan(effective, root, variant, lora, prompts, outputs, frames, size, fps, dtype)


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


def _prompts_and_outputs(config: InferConfig) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    if config.output.suffix.lower() != ".mp4":
        raise ConfigError(f"--output {str(config.output)!r}: the name must end in .mp4.")
    prompts = (*config.prompt, *_read_prompts(config.prompts_file))
    if len(prompts) == 1:
        return prompts, (config.output,)
    stem = config.output.stem
    return prompts, tuple(config.output.with_name(f"{stem}-{n:03}.mp4") for n in range(len(prompts)))


def _read_prompts(path: Path | None) -> list[str]:
    """One prompt a line. Blank lines are left out: nothing is matched to the lines, so nothing can shift."""
    if path is None:
        return []
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts-file {str(path)!r} cannot be read: {error}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts-file {str(path)!r} holds no prompts.")
    return prompts
