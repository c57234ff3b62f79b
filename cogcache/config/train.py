"""Settings of ``cogcache train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from cogcache.config.base import CommandConfig, DtypeChoice, setting
from cogcache.location import LocationField
from cogcache.lora.targets import parse_rank_pattern, plain_targets

__all__ = ["TrainConfig"]

_VALIDATION = "Validation"
_RUN = "Run"
_LORA = "LoRA"  # settings in this panel make no sense where all weights are trained
_OPTIM = "Optimisation"
_CKPT = "Checkpoints and logs"
_DEVICE = "Device and precision"
_MEMORY = "Memory and speed"
_REMOTE = "Shards on a server"


class TrainConfig(CommandConfig):
    """Settings of ``cogcache train``."""

    shards: LocationField = setting(
        ...,
        "Cache written by 'cogcache encode': a folder, or a URL (s3://, gs://, hf://, https://).",
        panel=_RUN,
    )
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
    memory: Literal["auto", "fast", "balanced", "small", "tiny", "plain"] = setting(
        "auto",
        "Memory tier; gradients are the same. fast: nothing is computed twice. balanced: attention is kept. small: "
        "weights and all that is kept in host memory. tiny: the optimizer, too. plain: diffusers' own blocks. "
        "auto: the fastest that fits a GPU, or no run. One that is named is tried, with a notice.",
        panel=_MEMORY,
    )
    gradient_checkpointing: bool | None = setting(
        None,
        "Recompute blocks in the backward pass: far less memory, more time. Default: the tier's; with plain, yes.",
        panel=_MEMORY,
    )
    keep_attention: Literal["no", "device", "host"] | None = setting(
        None,
        "Where attention outputs are kept, so that attention is not recomputed. Default: the tier's.",
        panel=_MEMORY,
    )
    keep_inputs: Literal["device", "host"] | None = setting(
        None, "Where each block's input is kept for the backward pass. Default: the tier's.", panel=_MEMORY
    )
    base_weights: Literal["device", "host"] | None = setting(
        None,
        "Where the blocks' frozen weights are; from the host they are streamed. Default: the tier's.",
        panel=_MEMORY,
    )
    base_storage: Literal["native", "int8"] | None = setting(
        None,
        "How the blocks' frozen matrices are kept: as they are, or in 8 bits, half the memory wherever they are; that "
        "moves gradients by about a hundredth. Default: native; int8 in tiny on a host with too little memory.",
        panel=_MEMORY,
    )
    in_parts: bool | None = setting(
        None,
        "Do a block's work in parts: half of the tokens at a time in its feed-forward; query, key and value one after "
        "the other. A quarter less memory at work, 2 to 8% more time. Default: the tier's, which is yes in tiny.",
        panel=_MEMORY,
    )
    optimizer_state: Literal["device", "host"] | None = setting(
        None, "Where the optimizer's state is. Default: the tier's.", panel=_MEMORY
    )
    compile: bool | None = setting(
        None,
        "Compile the blocks: faster steps after a minute's wait at the first. Default: the tier's, which is yes; with "
        "plain, no.",
        panel=_MEMORY,
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
    remote_cache: Path | None = setting(
        None,
        "Shards at a URL only: folder that keeps what was fetched for later epochs, for all runs on this machine. "
        "Default: ~/.cache/cogcache/remote.",
        panel=_REMOTE,
    )
    remote_cache_size: float = setting(
        20.0,
        "Shards at a URL only: size of that folder at most, in GB; 0 keeps nothing.",
        panel=_REMOTE,
        ge=0,
    )
    remote_patience: float = setting(
        10.0,
        "Shards at a URL only: minutes to wait for a server that does not answer any more. "
        "One that has never answered gets half a minute.",
        panel=_REMOTE,
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
    def _whole_weights_for_dora(self) -> TrainConfig:
        if self.dora and self.base_storage == "int8":
            raise ValueError("--dora needs the norms of whole weights: leave --base-storage int8 out")
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
