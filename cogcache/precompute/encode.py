"""``cogcache encode``: videos and captions in, a committed cache out.

The way of the data: lists -> clips with keys -> what is missing is planned into shards -> VAE over missing
latents and image conditions -> T5 over missing captions -> both again over what a killed process left -> tables
and manifest. One model is on the device at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch

from cogcache.cache.drop import drop_series
from cogcache.cache.format import IMAGES, LATENTS, TEXT, FailureRecord, Manifest
from cogcache.cache.needs import needs_of
from cogcache.cache.remote.mirror import Mirror
from cogcache.cache.rounds import fill_in_rounds
from cogcache.cache.writer import CacheWriter
from cogcache.config import EncodeConfig
from cogcache.config_io import save_config
from cogcache.cores import reading_threads
from cogcache.errors import PartialFailureError
from cogcache.location import Location, Url
from cogcache.precompute.captions import encode_text
from cogcache.precompute.clips import ClipWork, plan_clips, text_key
from cogcache.precompute.datasets import find_clips
from cogcache.precompute.dry_run import plan_run, tell_plan
from cogcache.precompute.piece import Tally
from cogcache.precompute.settings import EncodeSettings, decide, shards_folder
from cogcache.precompute.stages import encode_pieces
from cogcache.precompute.text import FrozenText
from cogcache.precompute.vae import FrozenVae
from cogcache.precompute.validation import ValidationPrompts, plan_validation
from cogcache.precompute.work import Work, plan_work
from cogcache.progress import console, say
from cogcache.wording import counted

__all__ = ["EncodeResult", "encode", "encode_all"]


@dataclass(frozen=True)
class EncodeResult:
    """What a run did. ``manifest`` is ``None`` while another process still works on the cache.

    ``encoded``, ``captions`` and ``images`` count the entries made: latents, embeddings and image conditions.
    ``spent`` says of each series how long its making took, and how long it waited.
    """

    shards: Path
    manifest: Manifest | None
    clips: int
    encoded: int
    captions: int
    failures: list[FailureRecord]
    images: int = 0
    spent: Mapping[str, Tally] = field(default_factory=dict)


def encode(config: EncodeConfig) -> EncodeResult:
    """Run ``cogcache encode`` and tell the user what was done.

    Raises:
        PartialFailureError: when all else is committed but some clips failed.
        CogcacheError: on bad input; nothing committed is ever lost.
    """
    result = encode_all(config)
    if config.dry_run:
        return result
    _summary(result, config.shards if isinstance(config.shards, Url) else result.shards)
    if result.failures:
        rest = "; the others are committed" if len(result.failures) < result.clips else ""
        raise PartialFailureError(
            f"{len(result.failures)} of {result.clips} clips failed{rest}.",
            f"Reasons are in {result.shards / 'failures.jsonl'}. The next run tries only these again.",
        )
    return result


def encode_all(
    config: EncodeConfig, load_vae: Callable[[EncodeSettings], FrozenVae] | None = None
) -> EncodeResult:
    """Encode all that is missing and commit; clips that failed are in the result. A dry run only tells its plan.

    Args:
        load_vae: Gives a VAE that is loaded already, instead of the checkpoint's.
    """
    mirror = _mirror(config)
    if config.dry_run:
        plan = plan_run(config)
        tell_plan(plan, config)
        return EncodeResult(shards_folder(config), None, plan.unchanged + len(plan.changes), 0, 0, [])
    items = find_clips(config.data_root, config.dataset, config.allow_outside)
    settings = decide(config, items)
    clips = plan_clips(items, settings)
    prompts = plan_validation(settings)
    if config.remake_images:
        if mirror:
            mirror.drop(IMAGES)
        drop_series(settings.shards, IMAGES, settings.identity())
    writer = CacheWriter.open(settings.shards, settings.identity(), settings.config.zarr_compression, mirror)
    save_config(settings.effective(), settings.shards / "encode.config.yaml")
    work = Work.of(clips, prompts, settings)
    plan_work(writer, work, settings)
    complete = fill_in_rounds(
        writer, work.wanted, partial(_fill, writer, work, settings, load_vae or _load_vae)
    )
    manifest, failures = _commit(writer, clips, prompts, settings) if complete else _leave_to_others()
    made = {series: tally.encoded for series, tally in work.tallies.items()}
    return EncodeResult(
        settings.shards,
        manifest,
        len(clips),
        made[LATENTS],
        made[TEXT],
        failures,
        made.get(IMAGES, 0),
        work.tallies,
    )


def _mirror(config: EncodeConfig) -> Mirror | None:
    """For a URL, what sends there all that is made, with the staging folder as far as the server is; else None."""
    if not isinstance(config.shards, Url):
        return None
    mirror = Mirror(config.shards, shards_folder(config))
    mirror.pull()
    return mirror


def _fill(
    writer: CacheWriter,
    work: Work,
    settings: EncodeSettings,
    load_vae: Callable[[EncodeSettings], FrozenVae],
    series: Collection[str],
) -> None:
    """One model after the other; only those of the series given."""
    pictures = [name for name in work.pieces if name in series]
    if pictures:
        _pictures(writer, work, settings, load_vae, pictures)
    if TEXT in series:
        _text(writer, work, settings)


def _pictures(
    writer: CacheWriter,
    work: Work,
    settings: EncodeSettings,
    load_vae: Callable[[EncodeSettings], FrozenVae],
    series: Sequence[str],
) -> None:
    """Everything the VAE makes: latents, and for image-to-video the image conditions."""
    units = {LATENTS: "clips", IMAGES: "image conditions"}
    try:
        vae = cache(partial(load_vae, settings))
        for name in series:
            workers = reading_threads(settings.config.workers)
            tally = encode_pieces(writer, name, work.pieces[name], vae, unit=units[name], workers=workers)
            work.tallies[name].add(tally)
    finally:
        del vae
        _free_memory()


def _load_vae(settings: EncodeSettings) -> FrozenVae:
    vae = FrozenVae(settings.model_root, settings.vae_dtype, tiled=settings.tiled, device=settings.device)
    for bucket in settings.buckets:
        vae.check_size(bucket.size)
    return vae


def _text(writer: CacheWriter, work: Work, settings: EncodeSettings) -> None:
    try:
        load = partial(_load_text, settings, list(work.captions.values()))
        tally = encode_text(writer, work.captions, load, settings.text_batch_size)
        work.tallies[TEXT].add(tally)
    finally:
        _free_memory()


def _load_text(settings: EncodeSettings, captions: Sequence[str]) -> FrozenText:
    length = settings.variant.text_length
    text = FrozenText(
        settings.model_root, settings.text_dtype, length, settings.device, offloaded=settings.text_offloaded()
    )
    cut = text.too_long(captions)
    if cut:
        say(
            f"Note: captions longer than {length} tokens are cut there, as the pipelines do: "
            f"{len(cut)} of {len(captions)}. The first: {cut[0][:60]!r}..."
        )
    return text


def _free_memory() -> None:
    """Give a model's memory back before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _leave_to_others() -> tuple[None, list[FailureRecord]]:
    say("Other processes still encode into this cache; the last one to finish writes the manifest.")
    return None, []


def _commit(
    writer: CacheWriter, clips: Sequence[ClipWork], prompts: ValidationPrompts, settings: EncodeSettings
) -> tuple[Manifest, list[FailureRecord]]:
    durable = {series: writer.usable(series) for series in settings.identity().series}
    reasons = writer.failures()
    complete = [clip for clip in clips if not _missing(clip, durable)]
    failures = [_failure(clip, _missing(clip, durable), reasons) for clip in clips if _missing(clip, durable)]
    samples = [clip.sample(settings) for clip in complete]
    lost = prompts.failures(durable, reasons)
    validation = prompts.complete(durable) if prompts.given or lost else None  # None keeps what is there
    return writer.commit(samples, failures + lost, text_key(settings, ""), validation), failures + lost


def _missing(clip: ClipWork, durable: dict[str, set[str]]) -> list[str]:
    return [key for series, key in needs_of(clip) if key not in durable[series]]


def _failure(clip: ClipWork, missing: Sequence[str], reasons: dict[str, str]) -> FailureRecord:
    reason = next((reasons[key] for key in missing if key in reasons), "not encoded")
    return FailureRecord(id=clip.id, source=clip.item.source, window=clip.window, reason=reason)


def _summary(result: EncodeResult, shards: Location) -> None:
    from rich.markup import escape
    from rich.table import Table

    ready = result.clips - len(result.failures)
    made = f"{counted(result.encoded, 'latent')}, {counted(result.captions, 'caption')}"
    made += f", {counted(result.images, 'image condition')}" if result.images else ""
    say(f"{shards}: {counted(ready, 'clip')} ready, {len(result.failures)} failed. Encoded now: {made}.")
    if result.encoded < ready:
        say(f"What was there before was not read again: 'cogcache verify {shards}' reads every byte.")
    if result.failures:
        table = Table("clip", "reason", title="Failed", title_justify="left")
        for failure in result.failures[:20]:
            table.add_row(escape(failure.source), escape(failure.reason))
        if len(result.failures) > 20:
            table.add_row("...", f"{len(result.failures) - 20} more")
        console().print(table)
