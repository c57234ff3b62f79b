"""``cogcache verify --decode``: encode some clips again, and decode what is stored.

Checksums show that bytes are those that were written. This shows that they are the right ones: a wrong encoder,
wrong frames or an entry of another clip give another latent. The verdict rests on the re-encoded latent alone; PSNR
of the decoded clip against its frames tells how good the VAE is, which for random weights is not good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cogcache.cache.damage import Damage, Report
from cogcache.cache.format import LATENTS, Identity, SampleRecord, digest
from cogcache.cache.identity import check_buckets, check_same, read_identity
from cogcache.cache.moments import LOGVAR_RANGE, LOGVAR_SLACK
from cogcache.cache.reader import CacheReader
from cogcache.config import EncodeConfig
from cogcache.config_io import load_config
from cogcache.decode import Decoder, open_decoder
from cogcache.errors import ConfigError, VideoError
from cogcache.models import torch_dtype
from cogcache.precompute.clips import ClipWork, plan_clips
from cogcache.precompute.datasets import find_clips
from cogcache.precompute.settings import EncodeSettings, decide
from cogcache.precompute.vae import FrozenVae
from cogcache.progress import Progress
from cogcache.video import load_clip

__all__ = ["TOLERANCES", "decode_again", "latent_error", "parse_share", "pick", "psnr"]

TOLERANCES = {"float32": 1e-2, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest relative error of a latent that was encoded twice, by the VAE's dtype: other devices and kernels round
differently, TF32 included. Latents of two different clips differ by about 1."""


def parse_share(text: str) -> tuple[float, bool]:
    """``"1%"`` as (0.01, True), ``"20"`` as (20, False).

    Raises:
        ConfigError: if it is neither a percentage of up to 100 nor a number of clips.
    """
    try:
        value = float(text.removesuffix("%"))
        relative = text.endswith("%")
        if relative and 0 < value <= 100:
            return value / 100, True
        if not relative and value >= 1 and value.is_integer():
            return value, False
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"--decode {text!r}: a share as 1% or a number of clips is needed.")


def pick(rows: Sequence[SampleRecord], share: str) -> list[SampleRecord]:
    """Clips to look at, always the same ones: those whose hashed ids come first."""
    value, relative = parse_share(share)
    count = math.ceil(value * len(rows)) if relative else int(value)
    return sorted(rows, key=lambda row: digest(["verify", row.id]))[:count]


def decode_again(
    report: Report, root: Path, share: str, data_root: Path | None = None, device: str = "auto"
) -> None:
    """Add to ``report`` a row for each clip looked at, and a damage for each latent that is not its clip's.

    Args:
        root: A cache that is whole so far.
        share: How many clips, see :func:`parse_share`.
        data_root: Folder of the videos. Default: the one that encode was given.

    Raises:
        MismatchError: if model or settings are not those that the latents were made with.
        ConfigError: if the settings of encode are not beside the cache.
        CogcacheError: if the model or the data root cannot be read.
    """
    cache = CacheReader(root)
    rows = pick(cache.samples, share)
    settings = _settings(root, data_root, device)
    identity = settings.identity()
    check_same(root, _identity(cache), identity, [LATENTS])
    check_buckets(root, read_identity(root), identity)
    clips = _clips(rows, settings)
    report.facts += [
        f"{row.source}: not the file that was encoded, or gone; its latent cannot be compared"
        for row in rows
        if row.latents not in clips
    ]
    rows = [row for row in rows if row.latents in clips]
    vae = FrozenVae(settings.model_root, settings.vae_dtype, tiled=settings.tiled, device=settings.device)
    dtype = torch_dtype(settings.vae_dtype)
    largest = max((bucket.size for bucket in settings.buckets), key=lambda size: size.height * size.width)
    with (
        Progress("Decoding", len(rows), "clips") as progress,
        open_decoder(settings.model_root, dtype, settings.device, largest) as decoder,
    ):
        for row in rows:
            _look(report, cache, row, clips[row.latents], settings, vae, decoder)
            progress.advance()


def _settings(root: Path, data_root: Path | None, device: str) -> EncodeSettings:
    file = root / "encode.config.yaml"
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing, so the settings of encode are not known.", "Verify without --decode."
        )
    changes: dict[str, Any] = {"shards": root, "device": device}
    if data_root is not None:
        changes["data_root"] = data_root
    return decide(load_config(EncodeConfig, changes, file))


def _identity(cache: CacheReader) -> Identity:
    manifest = cache.manifest
    return Identity(
        backend=manifest.backend,
        model=manifest.model,
        series={name: series.fingerprint for name, series in manifest.series.items()},
    )


def _clips(rows: Sequence[SampleRecord], settings: EncodeSettings) -> dict[str, ClipWork]:
    """The clips of these rows by the key of their latent; only their files are hashed."""
    config = settings.config
    sources = {row.source for row in rows}
    items = find_clips(config.data_root, config.dataset, config.allow_outside)
    found = plan_clips([item for item in items if item.source in sources], settings)
    return {clip.latents: clip for clip in found}


def _look(
    report: Report,
    cache: CacheReader,
    row: SampleRecord,
    clip: ClipWork,
    settings: EncodeSettings,
    vae: FrozenVae,
    decoder: Decoder,
) -> None:
    stored = cache.moments(row.latents)
    try:
        frames_fhwc = load_clip(clip.item.path, clip.request).frames
    except VideoError as trouble:
        report.facts.append(f"{row.source}: {trouble.message}; its latent cannot be compared")
        return
    slack = LOGVAR_SLACK if settings.config.log_variance == "8bit" else 0.0
    error = latent_error(stored, vae.encode(frames_fhwc.unsqueeze(0))[0], slack)
    mean_cfhw = stored.chunk(2)[0].float()
    decoded = torch.from_numpy(
        decoder.decode((mean_cfhw * settings.variant.scaling_factor).transpose(0, 1)).copy()
    )
    report.decoded.append(
        {
            "source": row.source,
            "window": row.window,
            "latent_error": error,
            "psnr_db": psnr(decoded, frames_fhwc),
        }
    )
    tolerance = TOLERANCES[settings.vae_dtype]
    if not error <= tolerance:
        what = f"its latent is not that of its clip: relative error {error:.2g}, at most {tolerance:g} is rounding"
        report.damages.append(Damage(LATENTS, what, key=row.latents, clips=(row.source,)))


def latent_error(stored: torch.Tensor, again: torch.Tensor, slack: float = 0.0) -> float:
    """Relative error of posterior moments ``[2C, F, H, W]``: of the means or the log-variances, the larger one.

    Each is ``|stored - again| / |again|`` in the Euclidean norm. A log-variance that may be off by ``slack``, since it
    was clamped and rounded when it was stored, counts only with what is beyond. To round the other one as well would
    make a whole step of what lies at the border of two.
    """
    if stored.shape != again.shape:
        return math.inf
    (mean, logvar), (mean_again, logvar_again) = stored.float().chunk(2), again.float().chunk(2)
    apart = (logvar - logvar_again).abs()
    if slack:
        apart = (logvar - logvar_again.clamp(*LOGVAR_RANGE)).abs().sub(slack).clamp_min(0)
    pairs = ((mean - mean_again, mean_again), (apart, logvar_again))
    return max(float(difference.norm() / value.norm().clamp_min(1e-6)) for difference, value in pairs)


def psnr(decoded_fhwc: torch.Tensor, frames_fhwc: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, over all pixels of 0..255; 99 where nothing differs."""
    squares = (decoded_fhwc.float() - frames_fhwc.float()).square().mean().item()
    return 99.0 if squares == 0 else 10 * math.log10(255**2 / squares)
