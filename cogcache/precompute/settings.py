"""From a command's settings and a checkpoint's facts to one decided set of values for the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogcache.cache.format import (
    IDENTITY_FILE,
    IMAGES,
    LATENTS,
    TEXT,
    BackendName,
    Fingerprint,
    Identity,
    ModelRecord,
    sort_buckets,
)
from cogcache.cache.identity import read_identity
from cogcache.cache.moments import PACKED_DTYPES
from cogcache.cache.remote.mirror import staging_folder
from cogcache.config import EncodeConfig
from cogcache.cores import reading_threads
from cogcache.errors import ConfigError
from cogcache.geometry import Bucket, parse_bucket, parse_size
from cogcache.location import Url
from cogcache.models import Component, pick_device, resolve_model, torch_dtype
from cogcache.precompute.buckets import Placing, choose_buckets
from cogcache.precompute.choose_tiling import choose_tiling
from cogcache.precompute.paths import ClipItem
from cogcache.precompute.shapes import look_at
from cogcache.precompute.text import choose_batch_size, choose_offload, text_fingerprint
from cogcache.precompute.vae import vae_fingerprint
from cogcache.progress import say
from cogcache.variants import Variant, read_variant, weights_dtype

__all__ = ["SIGMA_LOG_MEAN", "SIGMA_LOG_STD", "EncodeSettings", "decide", "shards_folder"]

SIGMA_LOG_MEAN, SIGMA_LOG_STD = -3.0, 0.5
"""Noise of the conditioning image in pixels of range -1..1: sigma = exp(N(mean, std))."""

_COMPONENTS: tuple[Component, ...] = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class EncodeSettings:
    """Everything decided. ``fps`` is ``None`` where every source frame is kept; there is at least one bucket."""

    config: EncodeConfig
    model_root: Path
    shards: Path
    variant: Variant
    device: torch.device
    buckets: tuple[Bucket, ...]
    fps: float | None
    vae_dtype: str
    text_dtype: str
    tiled: bool
    backend: BackendName

    @property
    def main(self) -> Bucket:
        """The bucket for what is no clip of its own: the model's default if it is among them, else the first."""
        default = Bucket.of(self.variant.sample_frames, self.variant.default_size)
        return default if default in self.buckets else self.buckets[0]

    @property
    def text_batch_size(self) -> int:
        """Captions embedded at once."""
        return choose_batch_size(self.config.text_batch_size, self.device)

    def text_offloaded(self) -> bool:
        """Whether the text encoder's weights stay on the host; ``auto`` asks for the GPU memory that is free now."""
        folder = self.model_root / "text_encoder"
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        wider = torch_dtype(self.text_dtype).itemsize / torch_dtype(weights_dtype(folder)).itemsize
        tokens = self.text_batch_size * self.variant.text_length
        return choose_offload(self.config.text_offload, int(stored * wider), tokens, self.device)

    @property
    def placing(self) -> Placing:
        """How clips are placed in buckets."""
        return Placing(self.config.fit, self.config.short, self.config.windows)

    def effective(self) -> EncodeConfig:
        """The settings with everything decided filled in: run with them again, the same is made.

        Image conditions are remade once, not each time these are used.
        """
        return self.config.model_copy(
            update={
                "data_root": self.config.data_root.resolve(),
                "model": self._model_id(),
                "shards": self.config.shards
                if isinstance(self.config.shards, Url)
                else self.shards.resolve(),
                **self._effective_buckets(),
                "fps": "source" if self.fps is None else repr(self.fps).removesuffix(".0"),
                "vae_dtype": self.vae_dtype,
                "text_dtype": self.text_dtype,
                "tiling": "on" if self.tiled else "off",
                "text_batch_size": self.text_batch_size,
                "format": self.backend,
                "remake_images": False,
            }
        )

    def _effective_buckets(self) -> dict[str, Any]:
        if len(self.buckets) == 1:
            return {"frames": self.main.frames, "size": str(self.main.size), "bucket": []}
        return {"frames": None, "size": None, "bucket": [str(bucket) for bucket in self.buckets]}

    def identity(self) -> Identity:
        """What the cache folder is bound to."""
        series = {LATENTS: self.latents_fingerprint(), TEXT: self.text_fingerprint()}
        if self.variant.task == "i2v":
            series[IMAGES] = self.images_fingerprint()
        return Identity(
            backend=self.backend,
            model=ModelRecord(id=self._model_id(), variant=self.variant),
            series=series,
            buckets=sort_buckets(map(str, self.buckets)),
        )

    def _model_id(self) -> str:
        # A local folder is remembered in full, so that training finds it from any working directory.
        local = Path(self.config.model).expanduser()
        return str(local.resolve()) if local.is_dir() else self.config.model

    def latents_fingerprint(self) -> Fingerprint:
        """Everything that determines the bytes of a latent, beside the file itself, the window and the bucket."""
        config = self.config
        return {
            **vae_fingerprint(self.model_root, self.vae_dtype, tiled=self.tiled),
            "log_variance": config.log_variance,
            "fps": "source" if self.fps is None else self.fps,
            "window": config.window if config.windows == 1 else f"{config.windows} windows",
            "short": config.short,
            "fit": config.fit,
            "interpolation": config.interpolation,
            "reader": "pyav" if config.reader == "auto" else config.reader,
        }

    def images_fingerprint(self) -> Fingerprint:
        """Everything that determines the bytes of an image condition, beside the picture, its size and the draw."""
        return {
            **vae_fingerprint(self.model_root, self.vae_dtype, tiled=self.tiled),
            "fit": self.config.fit,
            "interpolation": self.config.interpolation,
            "sigma_log_mean": SIGMA_LOG_MEAN,
            "sigma_log_std": SIGMA_LOG_STD,
        }

    def text_fingerprint(self) -> Fingerprint:
        """Everything that determines the bytes of an embedding, beside the caption itself."""
        return text_fingerprint(self.model_root, self.text_dtype, self.variant.text_length)


def shards_folder(config: EncodeConfig) -> Path:
    """The folder in which the cache is made: as given, by default named after the data root, or a URL's staging."""
    if isinstance(config.shards, Url):
        return staging_folder(config.shards, config.staging)
    return config.shards or Path("shards") / config.data_root.resolve().name


def decide(config: EncodeConfig, items: Sequence[ClipItem] = ()) -> EncodeSettings:
    """Fill in what the settings leave to the model, and check it against the model.

    Args:
        items: The clips, which ``--bucket auto`` looks at where no cache has decided it yet.

    Raises:
        ModelError, GeometryError, ConfigError: if something does not fit.
        DamagedCacheError: if a cache is there and its identity cannot be read.
    """
    root = resolve_model(config.model, _COMPONENTS)
    variant = read_variant(root)
    if config.remake_images and variant.task != "i2v":
        raise ConfigError("this model is text-to-video: there are no image conditions to remake.")
    shards = shards_folder(config)
    if config.image_draws != EncodeConfig.model_fields["image_draws"].default and variant.task != "i2v":
        say(
            f"Note: --image-draws is for image-to-video models; {config.model} makes videos of text: ignored."
        )
    fps = _fps(config.fps, variant)
    buckets = _buckets(config, variant, shards, items, fps)
    device = pick_device(config.device)
    vae_dtype = weights_dtype(root / "vae") if config.vae_dtype == "auto" else config.vae_dtype
    _check_log_variance(config, vae_dtype)
    text_dtype = weights_dtype(root / "text_encoder") if config.text_dtype == "auto" else config.text_dtype
    return EncodeSettings(
        config=config,
        model_root=root,
        shards=shards,
        variant=variant,
        device=device,
        buckets=buckets,
        fps=fps,
        vae_dtype=vae_dtype,
        text_dtype=text_dtype,
        tiled=_tiled(config, shards, buckets, vae_dtype, device),
        backend=config.format or _known_backend(shards),
    )


def _known_backend(shards: Path) -> BackendName:
    """A cache that is there keeps its own."""
    return read_identity(shards).backend if (shards / IDENTITY_FILE).is_file() else "webdataset"


def _check_log_variance(config: EncodeConfig, vae_dtype: str) -> None:
    if config.log_variance == "8bit" and vae_dtype not in PACKED_DTYPES:
        raise ConfigError(
            f"--log-variance 8bit is for latents of 16 bits, and these would be {vae_dtype}.",
            "Add --vae-dtype bfloat16, or leave --log-variance out.",
        )


def _fps(wanted: str, variant: Variant) -> float | None:
    if wanted == "source":
        return None
    return float(variant.native_fps) if wanted == "native" else float(wanted)


def _buckets(
    config: EncodeConfig, variant: Variant, shards: Path, items: Sequence[ClipItem], fps: float | None
) -> tuple[Bucket, ...]:
    if config.bucket == ["auto"]:
        return _auto_buckets(config, variant, shards, items, fps)
    if config.bucket:
        buckets = tuple(dict.fromkeys(parse_bucket(text) for text in config.bucket))
    else:
        size = parse_size(config.size) if config.size else variant.default_size
        buckets = (Bucket.of(config.frames or variant.sample_frames, size),)
    for bucket in buckets:
        variant.check_clip(bucket.frames, bucket.size)
    return buckets


def _auto_buckets(
    config: EncodeConfig, variant: Variant, shards: Path, items: Sequence[ClipItem], fps: float | None
) -> tuple[Bucket, ...]:
    """Those that the cache was begun with; for a new one, a few that suit the clips."""
    begun = read_identity(shards).buckets if (shards / IDENTITY_FILE).is_file() else ()
    if begun:
        say(f"Note: --bucket auto keeps the buckets of this cache: {' '.join(begun)}.")
        return tuple(map(parse_bucket, begun))
    looked = look_at([item.path for item in items], fps, reading_threads(config.workers))
    shapes = [shape for shape in looked if shape]
    chosen = choose_buckets(shapes, variant, Placing(config.fit, config.short, config.windows))
    say(f"Note: --bucket auto takes {' '.join(map(str, chosen))}.")
    return tuple(chosen)


def _tiled(
    config: EncodeConfig, shards: Path, buckets: Sequence[Bucket], dtype: str, device: torch.device
) -> bool:
    """A cache begun with one choice keeps it: what ``auto`` finds depends on the memory free today."""
    if config.tiling == "auto" and (shards / IDENTITY_FILE).is_file():
        return bool(read_identity(shards).series.get(LATENTS, {}).get("vae_tiling", "off") != "off")
    return choose_tiling(config.tiling, buckets, dtype, device)
