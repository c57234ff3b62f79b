"""Every setting of every command, declared once.

Each pydantic model is at the same time the command's flags (:mod:`cogcache.flags`), its YAML form (keys
are the flag names with ``_`` for ``-``), its ``--help`` text, and the record saved beside the output.
Unknown keys are refused. ``None`` as a default means "decided by the model or by another setting", as the
description says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from cogcache.lora.targets import parse_rank_pattern, plain_targets

__all__ = ["EncodeConfig", "ExtractImagesConfig", "InferConfig", "TrainConfig", "setting"]

DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]


def setting(default: Any, description: str, *, panel: str = "", **limits: Any) -> Any:
    """A pydantic field that also knows its ``--help`` panel."""
    extra: dict[str, Any] = {"panel": panel}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class CommandConfig(BaseModel):
    """Base of all command configs: frozen, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, defer_build=True, allow_inf_nan=False
    )


_DATA = "Clips and captions"
_FRAMES = "Frames and pictures"
_ENCODER = "Encoders"
_CACHE = "Cache"
_IMAGES = "Image conditions"
_VALIDATION = "Validation"
_RUN = "Run"
_LORA = "LoRA"
"""Settings in this panel make no sense where all weights are trained."""
_OPTIM = "Optimisation"
_CKPT = "Checkpoints and logs"
_DEVICE = "Device and precision"
_VIDEO = "Video"
_SAMPLING = "Sampling"


class EncodeConfig(CommandConfig):
    """Settings of ``cogcache encode``."""

    data_root: Path = setting(..., "Folder with the clips and their captions.", panel=_DATA)
    model: str = setting(
        ..., "CogVideoX checkpoint: a local folder in diffusers layout, or a hub id.", panel=_DATA
    )
    shards: Path | None = setting(
        None, "Folder for the cache. Default: shards/<name of the data root>.", panel=_CACHE
    )
    dataset: Literal["auto", "lists", "metadata", "sidecar"] = setting(
        "auto",
        "How captions are found: lists (prompts.txt + videos.txt), metadata (metadata.jsonl or .csv with "
        "file_name and text), sidecar (clip.txt beside clip.mp4), auto (the one that is there).",
        panel=_DATA,
    )
    allow_outside: bool = setting(
        False, "Accept absolute paths, '..' and links that lead out of the data root.", panel=_DATA
    )
    frames: int | None = setting(
        None, "Frames a clip, 8N+1. Default: the model's own, 49 or 81.", panel=_FRAMES, ge=1
    )
    size: str | None = setting(
        None, "Picture size, HEIGHTxWIDTH in pixels. Default: the model's own, e.g. 480x720.", panel=_FRAMES
    )
    fps: str = setting(
        "native",
        "Frames per second to pick, by timestamp: a number, 'native' (8 for CogVideoX 1.0, 16 for 1.5) "
        "or 'source' (every frame).",
        panel=_FRAMES,
    )
    window: Literal["start", "centre"] = setting(
        "start", "Where in a longer video the clip is taken.", panel=_FRAMES
    )
    windows: int = setting(
        1,
        "Clips taken from each video, spread evenly over it; more than 1 overrides --window.",
        panel=_FRAMES,
        ge=1,
    )
    short: Literal["fail", "pad"] = setting(
        "fail", "A video with too few frames fails, or is padded with its last frame.", panel=_FRAMES
    )
    fit: Literal["cover", "pad", "stretch"] = setting(
        "cover",
        "cover: fill and crop the centre; pad: show all, black bars; stretch: distort.",
        panel=_FRAMES,
    )
    interpolation: Literal["bicubic", "bilinear"] = setting(
        "bicubic", "Resampling filter (antialiased).", panel=_FRAMES
    )
    reader: Literal["auto", "decord", "pyav"] = setting(
        "auto",
        "Video reader; auto picks decord where it is known to be right, PyAV elsewhere.",
        panel=_FRAMES,
    )
    vae_dtype: DtypeChoice = setting(
        "auto", "Precision of the VAE and of stored latents; auto is that of its weights.", panel=_ENCODER
    )
    text_dtype: DtypeChoice = setting(
        "auto",
        "Precision of the T5 encoder and of stored embeddings; auto is that of its weights.",
        panel=_ENCODER,
    )
    tiling: Literal["auto", "on", "off"] = setting(
        "auto",
        "Encode pictures in overlapping tiles: less memory, less exact. auto: only where a whole picture "
        "does not fit the free GPU memory.",
        panel=_ENCODER,
    )
    text_batch_size: int = setting(8, "Captions encoded at once.", panel=_ENCODER, ge=1)
    image_draws: int = setting(
        8,
        "Image-to-video models only: independently noised first frames kept for each clip. Training draws one a step. "
        "More can be added to a finished cache at any time.",
        panel=_IMAGES,
        ge=1,
    )
    remake_images: bool = setting(
        False,
        "Drop the image conditions of this cache and make them anew; latents and text stay.",
        panel=_IMAGES,
    )
    validation_prompts: Path | None = setting(
        None,
        "Text file with one prompt a line: training can then sample videos from them without any encoder. "
        "Replaces those the cache has; without this flag they are kept.",
        panel=_VALIDATION,
    )
    validation_images: Path | None = setting(
        None,
        "Image-to-video models only: text file with the path of one picture a line, relative to it, for the prompt of "
        "the same line.",
        panel=_VALIDATION,
    )
    dry_run: bool = setting(
        False,
        "Only tell what would be done and why, clip by clip; load no model, change nothing.",
        panel=_RUN,
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.", panel=_RUN)
    workers: int = setting(2, "Threads that decode video ahead of the encoder.", panel=_RUN, ge=1)
    shard_size: float = setting(256.0, "Size at which a shard is full, in MB.", panel=_CACHE, gt=0)

    @field_validator("fps", mode="before")
    @classmethod
    def _fps_is_known(cls, value: object) -> str:
        text = str(value)
        if text in ("native", "source"):
            return text
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0 < number <= 1000:
            raise ValueError("give a positive number, 'native' or 'source'")
        return text


class ExtractImagesConfig(CommandConfig):
    """Settings of ``cogcache extract-images``."""

    data_root: Path = setting(..., "Folder with videos.txt.", panel=_DATA)
    output: Path = setting(
        Path("images"), "Folder for the images, inside the data root and relative to it.", panel=_DATA
    )
    overwrite: bool = setting(
        False, "Replace images.txt and images that are there already, edited ones too.", panel=_DATA
    )
    allow_outside: bool = setting(
        False, "Accept absolute paths, '..' and links that lead out of the data root.", panel=_DATA
    )
    reader: Literal["auto", "decord", "pyav"] = setting("auto", "Video reader.", panel=_RUN)
    workers: int = setting(2, "Threads that decode video.", panel=_RUN, ge=1)


class TrainConfig(CommandConfig):
    """Settings of ``cogcache train``."""

    shards: Path = setting(..., "Cache written by 'cogcache encode'.", panel=_RUN)
    output: Path | None = setting(
        None, "Folder for the LoRA, checkpoints and metrics. Default: runs/<name of the shards>.", panel=_RUN
    )
    model: str | None = setting(
        None, "Checkpoint, local folder or hub id. Default: the one the cache was made for.", panel=_RUN
    )
    seed: int = setting(
        42, "Decides every draw: order, noise, timesteps, posterior, dropout.", panel=_RUN, ge=0
    )
    training_type: Literal["lora", "full"] = setting(
        "lora",
        "lora: a small adapter in the frozen transformer; full: every weight, in float32, which takes about "
        "16 bytes of GPU memory for each.",
        panel=_RUN,
    )
    steps: int = setting(500, "Optimizer steps.", panel=_OPTIM, ge=1)
    batch_size: int = setting(1, "Samples in one forward pass, per process.", panel=_OPTIM, ge=1)
    grad_accum: int = setting(1, "Forward passes per optimizer step.", panel=_OPTIM, ge=1)
    lr: float = setting(1e-4, "Peak learning rate.", panel=_OPTIM, gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = setting(
        "constant", "Learning-rate schedule after the warm-up.", panel=_OPTIM
    )
    warmup_steps: int = setting(0, "Steps over which the learning rate rises from 0.", panel=_OPTIM, ge=0)
    beta1: float = setting(0.9, "AdamW beta1.", panel=_OPTIM, ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW beta2.", panel=_OPTIM, ge=0, lt=1)
    eps: float = setting(1e-8, "AdamW epsilon.", panel=_OPTIM, gt=0)
    weight_decay: float = setting(1e-4, "AdamW weight decay.", panel=_OPTIM, ge=0)
    max_grad_norm: float = setting(
        1.0, "Clip the gradient norm once per optimizer step; 0 is off.", panel=_OPTIM, ge=0
    )
    caption_dropout: float = setting(
        0.0,
        "Probability that a sample's caption is the empty one, drawn anew each epoch "
        "(CogVideoX was pretrained with 0.1).",
        panel=_OPTIM,
        ge=0,
        le=1,
    )
    image_dropout: float = setting(
        0.05,
        "Image-to-video only: probability that a sample's first-frame condition is zero, drawn anew each epoch.",
        panel=_OPTIM,
        ge=0,
        le=1,
    )
    rank: int = setting(128, "LoRA rank.", panel=_LORA, ge=1)
    alpha: float = setting(64.0, "LoRA alpha; the trained strength is alpha / rank.", panel=_LORA, gt=0)
    lora_dropout: float = setting(0.0, "Dropout before lora_A.", panel=_LORA, ge=0, lt=1)
    target_modules: Annotated[list[str], Field(min_length=1)] = setting(
        ["to_q", "to_k", "to_v", "to_out.0"],
        "Layers that get a LoRA; repeat the flag. attention, attention+ff (with the feed-forward layers), the end of "
        "a name (to_q), or re: and a regular expression for the whole name.",
        panel=_LORA,
    )
    rank_pattern: list[str] = setting(
        [],
        "Another rank for some layers: name=rank, at the same alpha / rank, or name=rank:alpha. The name is the end of "
        "a layer's, or a regular expression for it. Repeat the flag.",
        panel=_LORA,
    )
    dora: bool = setting(
        False, "DoRA: also train the length of each weight column. Slower, more memory.", panel=_LORA
    )
    rslora: bool = setting(False, "rsLoRA: the strength is alpha / sqrt(rank).", panel=_LORA)
    init_lora: Path | None = setting(
        None,
        "Start from the weights of this LoRA (a file or folder of this or another trainer), with a fresh optimizer. "
        "Rank, alpha, layers and kind come from it; if it does not say its alpha, from --alpha, else alpha = rank.",
        panel=_LORA,
    )
    gradient_checkpointing: bool = setting(
        True,
        "Recompute blocks in the backward pass: far less memory, about a third more time.",
        panel=_DEVICE,
    )
    dtype: DtypeChoice = setting(
        "auto",
        "Precision the base computes in; auto is that of its weights. What is trained is held in float32.",
        panel=_DEVICE,
    )
    device: str = setting(
        "auto", "auto, cpu or cuda. Under 'accelerate launch' each process takes its own.", panel=_DEVICE
    )
    workers: int = setting(
        1,
        "Threads that read and prepare batches ahead; 0 reads when needed. Results do not depend on it.",
        panel=_DEVICE,
        ge=0,
    )
    checkpoint_every: int = setting(100, "Optimizer steps between checkpoints; 0 is none.", panel=_CKPT, ge=0)
    keep_checkpoints: int = setting(
        3, "Checkpoints kept; the oldest are deleted. 0 keeps all.", panel=_CKPT, ge=0
    )
    resume: str | None = setting(
        None, "Go on from a checkpoint folder, or from the 'latest' in the output folder.", panel=_CKPT
    )
    log_every: int = setting(1, "Optimizer steps between lines in metrics.jsonl.", panel=_CKPT, ge=1)
    holdout: str | None = setting(
        None,
        "Hold videos out of training for validation: a percentage of them such as 5%, or a file with one source a line "
        "as samples.jsonl names them.",
        panel=_VALIDATION,
    )
    validate_every: int = setting(
        0,
        "Optimizer steps between validations (loss on the clips held out, sample videos), and one at the end; 0 is "
        "none. Results of training do not depend on it.",
        panel=_VALIDATION,
        ge=0,
    )
    validate_at_start: bool = setting(False, "Also validate before the first step.", panel=_VALIDATION)
    sample_videos: bool = setting(
        True,
        "Validation also samples a video from each prompt that 'cogcache encode --validation-prompts' cached.",
        panel=_VALIDATION,
    )
    sample_steps: int = setting(30, "Denoising steps of sample videos.", panel=_VALIDATION, ge=1)
    sample_guidance: float = setting(
        6.0, "Classifier-free guidance scale of sample videos; 1 is off.", panel=_VALIDATION, ge=1
    )
    sample_seed: int = setting(
        42,
        "Seed of the sample videos' starting noise, the same at every validation; prompt number N uses seed + N, as in "
        "infer.",
        panel=_VALIDATION,
        ge=0,
    )
    report_to: list[Literal["tensorboard", "wandb"]] = setting(
        [], "Also log to tensorboard and/or wandb. Repeat the flag.", panel=_CKPT
    )

    @field_validator("target_modules", mode="after")
    @classmethod
    def _targets_can_be_read(cls, value: list[str]) -> list[str]:
        plain_targets(value)
        return value

    @field_validator("rank_pattern", mode="after")
    @classmethod
    def _rank_patterns_can_be_read(cls, value: list[str]) -> list[str]:
        return [str(parse_rank_pattern(text)) for text in value]

    @model_validator(mode="after")
    def _start_is_only_one_of_many(self) -> TrainConfig:
        if self.validate_at_start and not self.validate_every:
            raise ValueError("--validate-at-start needs --validate-every")
        return self

    @model_validator(mode="after")
    def _no_lora_settings_in_full(self) -> TrainConfig:
        given = sorted(_lora_settings() & self.model_fields_set)
        if self.training_type == "full" and given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"--training-type full trains no LoRA: leave {flags} out")
        return self

    @model_serializer(mode="wrap")
    def _without_lora_settings_in_full(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        settings: dict[str, Any] = dump(self)
        unused = _lora_settings() if self.training_type == "full" else frozenset()
        return {name: value for name, value in settings.items() if name not in unused}


def _lora_settings() -> frozenset[str]:
    """Names of the training settings that are about the LoRA."""
    extras = {name: field.json_schema_extra for name, field in TrainConfig.model_fields.items()}
    return frozenset(name for name, e in extras.items() if isinstance(e, dict) and e.get("panel") == _LORA)


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
