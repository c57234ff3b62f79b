"""``cogcache encode``: videos and captions in, a committed cache out.

The way of the data: lists -> clips with keys -> what is missing is planned into shards -> VAE over missing
latents and image conditions -> T5 over missing captions -> tables and manifest. One model is on the device
at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from cogcache.cache.format import IMAGES, LATENTS, TEXT, FailureRecord, Manifest
from cogcache.cache.names import parse_group
from cogcache.cache.writer import CacheWriter, drop_series
from cogcache.config import EncodeConfig
from cogcache.config_io import save_config
from cogcache.errors import PartialFailureError
from cogcache.geometry import Size
from cogcache.models import torch_dtype
from cogcache.precompute.clips import ClipWork, plan_clips, text_key
from cogcache.precompute.datasets import find_clips
from cogcache.precompute.dry_run import plan_run, tell_plan
from cogcache.precompute.pieces import image_pieces, latent_piece, validation_pieces
from cogcache.precompute.settings import EncodeSettings, decide
from cogcache.precompute.stages import Piece, Tally, encode_pieces, encode_text
from cogcache.precompute.text import FrozenText
from cogcache.precompute.vae import FrozenVae
from cogcache.precompute.validation import ValidationPrompts, plan_validation
from cogcache.progress import console, say

__all__ = ["EncodeResult", "encode", "encode_all"]


@dataclass(frozen=True)
class EncodeResult:
    """What a run did. ``manifest`` is ``None`` while another process still works on the cache.

    ``encoded``, ``captions`` and ``images`` count the entries made: latents, embeddings and image conditions.
    """

    shards: Path
    manifest: Manifest | None
    clips: int
    encoded: int
    captions: int
    failures: list[FailureRecord]
    images: int = 0


def encode(config: EncodeConfig) -> EncodeResult:
    """Run ``cogcache encode`` and tell the user what was done.

    Raises:
        PartialFailureError: when all else is committed but some clips failed.
        CogcacheError: on bad input; nothing committed is ever lost.
    """
    result = encode_all(config)
    if config.dry_run:
        return result
    _summary(result)
    if result.failures:
        rest = "; the others are committed" if len(result.failures) < result.clips else ""
        raise PartialFailureError(
            f"{len(result.failures)} of {result.clips} clips failed{rest}.",
            f"Reasons are in {result.shards / 'failures.jsonl'}. The next run tries only these again.",
        )
    return result


def encode_all(config: EncodeConfig) -> EncodeResult:
    """Encode all that is missing and commit; clips that failed are in the result. A dry run only tells its plan."""
    if config.dry_run:
        plan = plan_run(config)
        tell_plan(plan, config)
        shards = config.shards or Path("shards") / config.data_root.resolve().name
        return EncodeResult(shards, None, plan.unchanged + len(plan.changes), 0, 0, [])
    items = find_clips(config.data_root, config.dataset, config.allow_outside)
    settings = decide(config, items)
    clips = plan_clips(items, settings)
    prompts = plan_validation(settings)
    if config.remake_images:
        drop_series(settings.shards, IMAGES, settings.identity())
    writer = CacheWriter.open(settings.shards, settings.identity(), settings.config.zarr_compression)
    save_config(settings.effective(), settings.shards / "encode.config.yaml")
    latents, images = _pictures(writer, clips, prompts, settings)
    captions = _text(writer, clips, prompts, settings)
    manifest, failures = _commit(writer, clips, prompts, settings)
    return EncodeResult(
        settings.shards, manifest, len(clips), latents.encoded, captions.encoded, failures, images.encoded
    )


def _pictures(
    writer: CacheWriter, clips: Sequence[ClipWork], prompts: ValidationPrompts, settings: EncodeSettings
) -> tuple[Tally, Tally]:
    """Everything the VAE makes: latents, and for image-to-video the image conditions."""
    latents = [latent_piece(clip) for clip in clips]
    images = [piece for clip in clips for piece in image_pieces(clip, settings)]
    images += validation_pieces(prompts.images, settings)
    _plan(writer, LATENTS, latents, settings)
    workers = settings.config.workers
    try:
        vae = cache(lambda: _load_vae(settings))
        clip_tally = encode_pieces(writer, LATENTS, latents, vae, unit="clips", workers=workers)
        image_tally = Tally()
        if images:
            _plan(writer, IMAGES, images, settings)
            image_tally = encode_pieces(writer, IMAGES, images, vae, unit="image conditions", workers=workers)
        return clip_tally, image_tally
    finally:
        del vae
        _free_memory()


def _plan(
    writer: CacheWriter, series: str, pieces: Sequence[Piece[Any, Any]], settings: EncodeSettings
) -> None:
    """Plan the shards of each group by itself, in the order of their numbers."""
    groups: dict[str, list[str]] = {}
    for piece in pieces:
        groups.setdefault(piece.group, []).append(piece.key)
    for group in sorted(groups, key=parse_group):
        *frames, height, width = parse_group(group)
        # Latents are kept as mean and log-variance, image conditions as one value.
        parts = 2 if series == LATENTS else 1
        values = parts * _product(
            settings.variant.latent_shape(frames[0] if frames else 1, Size(height, width))
        )
        writer.plan(series, groups[group], _per_shard(settings, settings.vae_dtype, values), group)


def _load_vae(settings: EncodeSettings) -> FrozenVae:
    vae = FrozenVae(settings.model_root, settings.vae_dtype, tiled=settings.tiled, device=settings.device)
    for bucket in settings.buckets:
        vae.check_size(bucket.size)
    return vae


def _text(
    writer: CacheWriter, clips: Sequence[ClipWork], prompts: ValidationPrompts, settings: EncodeSettings
) -> Tally:
    # The empty caption is always there: caption dropout and classifier-free guidance use it.
    captions = (
        {text_key(settings, ""): ""} | {clip.text: clip.item.caption for clip in clips} | prompts.captions
    )
    values = settings.variant.text_length * settings.variant.text_dim
    group = str(settings.variant.text_length)
    writer.plan(TEXT, list(captions), _per_shard(settings, settings.text_dtype, values), group)
    try:
        load = partial(_load_text, settings, list(captions.values()))
        return encode_text(writer, captions, load, settings.config.text_batch_size)
    finally:
        _free_memory()


def _load_text(settings: EncodeSettings, captions: Sequence[str]) -> FrozenText:
    text = FrozenText(settings.model_root, settings.text_dtype, settings.variant.text_length, settings.device)
    cut = text.too_long(captions)
    if cut:
        say(
            f"Note: captions longer than {settings.variant.text_length} tokens are cut there, as the pipelines do: "
            f"{len(cut)} of {len(captions)}. The first: {cut[0][:60]!r}..."
        )
    return text


def _free_memory() -> None:
    """Give a model's memory back before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _commit(
    writer: CacheWriter, clips: Sequence[ClipWork], prompts: ValidationPrompts, settings: EncodeSettings
) -> tuple[Manifest | None, list[FailureRecord]]:
    if writer.busy():
        say("Other processes still encode into this cache; the last one to finish writes the manifest.")
        return None, []
    durable = {series: writer.committed(series) for series in settings.identity().series}
    reasons = writer.failures()
    complete = [clip for clip in clips if not _missing(clip, durable)]
    failures = [_failure(clip, _missing(clip, durable), reasons) for clip in clips if _missing(clip, durable)]
    samples = [clip.sample(settings) for clip in complete]
    lost = prompts.failures(durable, reasons)
    validation = prompts.complete(durable) if prompts.given or lost else None  # None keeps what is there
    return writer.commit(samples, failures + lost, text_key(settings, ""), validation), failures + lost


def _missing(clip: ClipWork, durable: dict[str, set[str]]) -> list[str]:
    needed = [(LATENTS, clip.latents), (TEXT, clip.text), *((IMAGES, key) for key in clip.images)]
    return [key for series, key in needed if key not in durable[series]]


def _failure(clip: ClipWork, missing: Sequence[str], reasons: dict[str, str]) -> FailureRecord:
    reason = next((reasons[key] for key in missing if key in reasons), "not encoded")
    return FailureRecord(id=clip.id, source=clip.item.source, window=clip.window, reason=reason)


def _per_shard(settings: EncodeSettings, dtype: str, values: int) -> int:
    """Entries of ``values`` numbers each that fill a shard."""
    return max(1, int(settings.config.shard_size * 1e6 // (values * torch_dtype(dtype).itemsize)))


def _product(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _summary(result: EncodeResult) -> None:
    from rich.markup import escape
    from rich.table import Table

    ready = result.clips - len(result.failures)
    made = f"{result.encoded} latents, {result.captions} captions"
    made += f", {result.images} image conditions" if result.images else ""
    say(f"{result.shards}: {ready} clips ready, {len(result.failures)} failed. Encoded now: {made}.")
    if result.failures:
        table = Table("clip", "reason", title="Failed", title_justify="left")
        for failure in result.failures[:20]:
            table.add_row(escape(failure.source), escape(failure.reason))
        if len(result.failures) > 20:
            table.add_row("...", f"{len(result.failures) - 20} more")
        console().print(table)
