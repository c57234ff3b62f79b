"""Settings of the commands that read videos: encode and extract-images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator

from cogcache.config.base import CommandConfig, DtypeChoice, setting
from cogcache.location import LocationField

__all__ = ["EncodeConfig", "ExtractImagesConfig"]

_DATA = "Clips and captions"
_FRAMES = "Frames and pictures"
_ENCODER = "Encoders"
_CACHE = "Cache"
_IMAGES = "Image conditions"
_VALIDATION = "Validation"
_RUN = "Run"


class EncodeConfig(CommandConfig):
    """Settings of ``cogcache encode``."""

    data_root: Path = setting(..., "Folder with the clips and their captions.", panel=_DATA)
    model: str = setting(
        ..., "CogVideoX checkpoint: a local folder in diffusers layout, or a hub id.", panel=_DATA
    )
    shards: LocationField | None = setting(
        None,
        "Folder for the cache, or a URL (s3://, gs://, hf://). Default: shards/<name of the data root>.",
        panel=_CACHE,
    )
    staging: Path | None = setting(
        None,
        "Shards at a URL only: folder in which they are made, then sent. Default: one in ~/.cache/cogcache/staging.",
        panel=_CACHE,
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
    bucket: list[str] = setting(
        [],
        "FRAMESxHEIGHTxWIDTH, as often as wanted, instead of --frames and --size: each clip goes where the least of "
        "it is lost or made up. auto: a few that suit the clips, decided once.",
        panel=_FRAMES,
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
        "Video reader; auto is pyav. decord reads fewer formats, and each clip is then decoded twice, since decord "
        "hides damage.",
        panel=_FRAMES,
    )
    vae_dtype: DtypeChoice = setting(
        "auto", "Precision of the VAE and of stored latents; auto is that of its weights.", panel=_ENCODER
    )
    log_variance: Literal["full", "8bit"] = setting(
        "full",
        "How log-variances are stored. 8bit: a quarter less disk for latents, less than that in compressed zarr; the "
        "posterior's standard deviation changes by 3% (RMS), 5.1% at most. Only with a --vae-dtype of 16 bits.",
        panel=_ENCODER,
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
    text_batch_size: int | None = setting(
        None, "Captions encoded at once. Default: 32 on a GPU, 8 on a CPU.", panel=_ENCODER, ge=1
    )
    text_offload: Literal["auto", "on", "off"] = setting(
        "auto",
        "Keep the weights of the T5 encoder in host memory and stream them through the GPU, block by block: the same "
        "values in a quarter of the GPU memory. auto: only where they do not fit the free GPU memory.",
        panel=_ENCODER,
    )
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
    workers: int | None = setting(
        None,
        "Threads that decode video ahead of the encoder. Default: one less than the processor cores that may be used, "
        "from 2 to 8.",
        panel=_RUN,
        ge=1,
    )
    format: Literal["webdataset", "zarr"] | None = setting(
        None,
        "How shards are stored: webdataset (tar files) or zarr (sharded arrays, compressed). "
        "Default: as the cache that is there, else webdataset.",
        panel=_CACHE,
    )
    zarr_compression: Literal["zstd", "none"] = setting(
        "zstd", "Compression of zarr shards. Arrays that are there keep theirs.", panel=_CACHE
    )
    shard_size: float = setting(256.0, "Size at which a shard is full, in MB.", panel=_CACHE, gt=0)

    @field_validator("bucket", mode="before")
    @classmethod
    def _one_bucket_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _buckets_stand_alone(self) -> EncodeConfig:
        if self.bucket and (self.frames is not None or self.size is not None):
            raise ValueError("--bucket takes the place of --frames and --size: give either.")
        if "auto" in self.bucket and len(self.bucket) > 1:
            raise ValueError("--bucket auto stands alone: leave it or the other buckets out.")
        return self

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
    workers: int | None = setting(
        None,
        "Threads that decode video. Default: one less than the processor cores that may be used, from 2 to 8.",
        panel=_RUN,
        ge=1,
    )
