"""``cogcache encode``: videos and captions in, a committed cache out.

The way of the data: lists -> clips with keys -> what is missing is planned into shards -> VAE over the
missing latents -> T5 over the missing captions -> tables and manifest. One model is on the device at a
time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from cogcache.cache.format import LATENTS, TEXT, FailureRecord, Manifest
from cogcache.cache.writer import CacheWriter
from cogcache.config import EncodeConfig
from cogcache.config_io import save_config
from cogcache.errors import PartialFailureError
from cogcache.models import torch_dtype
from cogcache.precompute.clips import ClipWork, plan_clips, text_key
from cogcache.precompute.datasets import find_clips
from cogcache.precompute.settings import EncodeSettings, decide
from cogcache.precompute.stages import Tally, encode_latents, encode_text
from cogcache.precompute.text import FrozenText
from cogcache.precompute.vae import FrozenVae
from cogcache.progress import console, say

__all__ = ["EncodeResult", "encode", "encode_all"]

T = TypeVar("T")


@dataclass(frozen=True)
class EncodeResult:
    """What a run did. ``manifest`` is ``None`` while another process still works on the cache."""

    shards: Path
    manifest: Manifest | None
    clips: int
    encoded: int
    captions: int
    failures: list[FailureRecord]


def encode(config: EncodeConfig) -> EncodeResult:
    """Run ``cogcache encode`` and tell the user what was done.

    Raises:
        PartialFailureError: when all else is committed but some clips failed.
        CogcacheError: on bad input; nothing committed is ever lost.
    """
    result = encode_all(config)
    _summary(result)
    if result.failures:
        raise PartialFailureError(
            f"{len(result.failures)} of {result.clips} clips failed; the others are committed.",
            f"Reasons are in {result.shards / 'failures.jsonl'}. The next run tries only these again.",
        )
    return result


def encode_all(config: EncodeConfig) -> EncodeResult:
    """Encode all that is missing and commit; clips that failed are in the result."""
    items = find_clips(config.data_root, config.dataset, config.allow_outside)
    settings = decide(config)
    clips = plan_clips(items, settings)
    writer = CacheWriter.open(settings.shards, settings.identity())
    save_config(config, settings.shards / "encode.config.yaml")
    pictures = _latents(writer, clips, settings)
    captions = _text(writer, clips, settings)
    manifest, failures = _commit(writer, clips, settings)
    return EncodeResult(settings.shards, manifest, len(clips), pictures.encoded, captions.encoded, failures)


def _latents(writer: CacheWriter, clips: Sequence[ClipWork], settings: EncodeSettings) -> Tally:
    by_key = {clip.latents: clip for clip in reversed(clips)}
    shape = settings.variant.latent_shape(settings.frames, settings.size)
    entry_bytes = 2 * _product(shape) * torch_dtype(settings.vae_dtype).itemsize
    keys = list(dict.fromkeys(clip.latents for clip in clips))
    writer.plan(LATENTS, keys, _per_shard(settings, entry_bytes))
    return _with_model(
        lambda load: encode_latents(writer, by_key, load, settings.config.workers),
        lambda: _load_vae(settings),
    )


def _load_vae(settings: EncodeSettings) -> FrozenVae:
    vae = FrozenVae(settings.model_root, settings.vae_dtype, tiled=settings.tiled, device=settings.device)
    vae.check_size(settings.size)
    return vae


def _text(writer: CacheWriter, clips: Sequence[ClipWork], settings: EncodeSettings) -> Tally:
    # The empty caption is always there: caption dropout and classifier-free guidance use it.
    captions = {text_key(settings, ""): ""} | {clip.text: clip.item.caption for clip in clips}
    entry_bytes = (
        settings.variant.text_length * settings.variant.text_dim * torch_dtype(settings.text_dtype).itemsize
    )
    writer.plan(TEXT, list(captions), _per_shard(settings, entry_bytes))
    return _with_model(
        lambda load: encode_text(writer, captions, load, settings.config.text_batch_size),
        lambda: _load_text(settings, list(captions.values())),
    )


def _load_text(settings: EncodeSettings, captions: Sequence[str]) -> FrozenText:
    text = FrozenText(settings.model_root, settings.text_dtype, settings.variant.text_length, settings.device)
    cut = text.too_long(captions)
    if cut:
        say(
            f"Note: {len(cut)} captions are longer than {settings.variant.text_length} tokens and are cut there, "
            f"as the pipelines do. The first: {cut[0][:60]!r}..."
        )
    return text


def _with_model(stage: Callable[[Callable[[], T]], Tally], load: Callable[[], T]) -> Tally:
    """Run a stage that may load a model, and free the model's memory before the next one."""
    try:
        return stage(load)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _commit(
    writer: CacheWriter, clips: Sequence[ClipWork], settings: EncodeSettings
) -> tuple[Manifest | None, list[FailureRecord]]:
    if writer.busy():
        say("Other processes still encode into this cache; the last one to finish writes the manifest.")
        return None, []
    durable, reasons = writer.committed(LATENTS), writer.failures()
    samples = [clip.sample(settings) for clip in clips if clip.latents in durable]
    failures = [_failure(clip, reasons) for clip in clips if clip.latents not in durable]
    return writer.commit(samples, failures, text_key(settings, "")), failures


def _failure(clip: ClipWork, reasons: dict[str, str]) -> FailureRecord:
    reason = reasons.get(clip.latents, "not encoded")
    return FailureRecord(id=clip.id, source=clip.item.source, window=clip.window, reason=reason)


def _per_shard(settings: EncodeSettings, entry_bytes: int) -> int:
    return max(1, int(settings.config.shard_size * 1e6 // entry_bytes))


def _product(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _summary(result: EncodeResult) -> None:
    from rich.table import Table

    kept = result.clips - result.encoded - len(result.failures)
    say(
        f"{result.shards}: {result.encoded} clips encoded, {kept} already there, {len(result.failures)} failed; "
        f"{result.captions} captions encoded."
    )
    if result.failures:
        table = Table("clip", "reason", title="Failed", title_justify="left")
        for failure in result.failures[:20]:
            table.add_row(failure.source, failure.reason)
        if len(result.failures) > 20:
            table.add_row("...", f"{len(result.failures) - 20} more")
        console().print(table)
