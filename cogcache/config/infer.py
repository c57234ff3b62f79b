"""Settings of ``cogcache infer``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    model_validator,
)

from cogcache.config.base import CommandConfig, DtypeChoice, setting

__all__ = ["InferConfig"]

_RUN = "Run"
_DEVICE = "Device and precision"
_VIDEO = "Video"
_SAMPLING = "Sampling"


class InferConfig(CommandConfig):
    """Settings of ``cogcache infer``."""

    lora: Path | None = setting(
        None,
        "LoRA file (.safetensors) or PEFT adapter folder, of this or another trainer. Without it the base "
        "model generates.",
        panel=_RUN,
    )
    lora_alpha: float | None = setting(
        None,
        "Alpha that the LoRA was trained with, for files that do not say it. Default: its rank, as diffusers takes "
        "it. The CogVideo reference trainer stores none; its default is 64 at rank 128.",
        panel=_RUN,
        gt=0,
    )
    transformer: Path | None = setting(
        None,
        "Output folder (or checkpoint) of a training of all weights, whose transformer is used instead of the "
        "model's own.",
        panel=_RUN,
    )
    model: str | None = setting(
        None,
        "Checkpoint, local folder or hub id. Default: the one the LoRA or the transformer was trained from.",
        panel=_RUN,
    )
    prompt: list[str] = setting([], "Prompt; repeat the flag for several videos.", panel=_VIDEO)
    prompts_file: Path | None = setting(None, "Text file with one prompt a line.", panel=_VIDEO)
    image: list[Path] = setting(
        [],
        "First frame, for image-to-video models; repeat the flag, one a prompt, or give one for all. Fitted by "
        "filling the picture size and cropping the centre.",
        panel=_VIDEO,
    )
    images_file: Path | None = setting(
        None, "Text file with one first frame a line, relative to its folder.", panel=_VIDEO
    )
    video: list[Path] = setting(
        [],
        "Source video, for video-to-video with a text-to-video model; repeat the flag, one a prompt, or give one "
        "for all. Its beginning is taken, at --fps.",
        panel=_VIDEO,
    )
    strength: float = setting(
        0.8,
        "Video-to-video only: how much of the source is drawn anew; 1 is all.",
        panel=_SAMPLING,
        gt=0,
        le=1,
    )
    negative_prompt: str = setting("", "What the video should not show.", panel=_VIDEO)
    output: Path = setting(
        Path("output.mp4"),
        "Video file; with several prompts -000, -001... is added to its name.",
        panel=_VIDEO,
    )
    overwrite: bool = setting(False, "Replace video files that are already there.", panel=_VIDEO)
    frames: int | None = setting(
        None, "Frames, 8N+1. Default: as trained, else the model's own.", panel=_VIDEO, ge=1
    )
    size: str | None = setting(
        None, "Picture size, HEIGHTxWIDTH in pixels. Default: as trained, else the model's own.", panel=_VIDEO
    )
    fps: float | None = setting(
        None,
        "Frames per second of the file. Default: as trained, else 8 for 1.0 and 16 for 1.5.",
        panel=_VIDEO,
        gt=0,
    )
    steps: int = setting(50, "Denoising steps.", panel=_SAMPLING, ge=1)
    guidance: float = setting(6.0, "Classifier-free guidance scale; 1 is off.", panel=_SAMPLING, ge=1)
    seed: int = setting(
        42, "Seed of the starting noise; prompt number N uses seed + N.", panel=_SAMPLING, ge=0
    )
    scheduler: Literal["auto", "ddim", "dpm"] = setting(
        "auto", "Sampler; auto is the one in the checkpoint.", panel=_SAMPLING
    )
    lora_scale: float = setting(
        1.0, "Strength of the LoRA; 1 is as trained, 0 is the base model.", panel=_SAMPLING
    )
    fuse: bool = setting(
        False, "Merge the LoRA into the weights before sampling: a little faster.", panel=_SAMPLING
    )
    offload: Literal["none", "model", "sequential"] = setting(
        "none",
        "Keep modules on the CPU until needed: model (less memory) or sequential (least, slow).",
        panel=_DEVICE,
    )
    tiling: bool = setting(True, "Decode in tiles: far less memory.", panel=_DEVICE)
    dtype: DtypeChoice = setting(
        "auto", "Precision; auto is that of the transformer's weights.", panel=_DEVICE
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.", panel=_DEVICE)

    @model_validator(mode="after")
    def _something_to_run(self) -> InferConfig:
        if self.lora is None and self.transformer is None and self.model is None:
            raise ValueError("give --lora or --transformer, or --model to run the base model alone")
        if not self.prompt and self.prompts_file is None:
            raise ValueError("give --prompt or --prompts-file")
        if self.lora is None and self.lora_alpha is not None:
            raise ValueError("--lora-alpha is about a --lora")
        return self
